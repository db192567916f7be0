"""Let a student prefer better answers, with NeMo-Aligner: python recipes/preference.py +conf=instruct student=RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.alignment import preference
from nemo_minitron.alignment.settings import PreferenceRecipe

if __name__ == "__main__":
    recipe.main("preference", PreferenceRecipe, preference.check, preference.run)
