"""Score a model's greedy answers to held-out instructions: python recipes/evaluate_instruct.py source=RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.instruct_config import EvaluateInstructRecipe
from nemo_minitron.nemo import evaluate_instruct

if __name__ == "__main__":
    recipe.main("evaluate_instruct", EvaluateInstructRecipe, evaluate_instruct.check, evaluate_instruct.run)
