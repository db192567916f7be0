"""Fine-tune a student on conversations with NeMo-Aligner: python recipes/sft.py +conf=instruct student=RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.alignment import sft
from nemo_minitron.alignment.settings import SftRecipe

if __name__ == "__main__":
    recipe.main("sft", SftRecipe, sft.check, sft.run)
