"""Score a model's greedy answers to held-out instructions: python recipes/evaluate_instruct.py source=RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("evaluate_instruct")
