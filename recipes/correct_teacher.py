"""Fine-tune a teacher on the distillation corpus: python recipes/correct_teacher.py teacher=DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.config import CorrectTeacherRecipe
from nemo_minitron.nemo import correct_teacher

if __name__ == "__main__":
    recipe.main("correct_teacher", CorrectTeacherRecipe, correct_teacher.check, correct_teacher.run)
