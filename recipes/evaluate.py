"""Measure a model, sharded as it is, with error bars: python recipes/evaluate.py source=RUN eval=local"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("evaluate")
