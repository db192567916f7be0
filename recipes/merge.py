"""Merge models of one architecture: python recipes/merge.py 'models=[A,B]' base=C merge=ties"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("merge")
