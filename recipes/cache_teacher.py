"""Keep a teacher's states on disk: python recipes/cache_teacher.py +conf=width teacher=DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.config import CacheTeacherRecipe
from nemo_minitron.nemo import cache_teacher

if __name__ == "__main__":
    recipe.main("cache_teacher", CacheTeacherRecipe, cache_teacher.check, cache_teacher.run)
