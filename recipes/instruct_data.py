"""Make the project's own instruct set, or convert and check others' data: python recipes/instruct_data.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("instruct_data")
