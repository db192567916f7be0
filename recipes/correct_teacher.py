"""Fine-tune a teacher on the distillation corpus: python recipes/correct_teacher.py teacher=DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("correct_teacher")
