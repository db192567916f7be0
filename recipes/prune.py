"""Prune a model: python recipes/prune.py +conf=width"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.config import PruneRecipe
from nemo_minitron.nemo import prune

if __name__ == "__main__":
    recipe.main("prune", PruneRecipe, prune.check, prune.run)
