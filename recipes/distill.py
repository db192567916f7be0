"""Train a student on its teacher: python recipes/distill.py +conf=width student=RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.config import DistillRecipe
from nemo_minitron.nemo import distill

if __name__ == "__main__":
    recipe.main("distill", DistillRecipe, distill.check, distill.run)
