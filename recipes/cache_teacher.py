"""Keep a teacher's states on disk: python recipes/cache_teacher.py +conf=width teacher=DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("cache_teacher")
