"""Make the project's own instruct set, or convert and check others' data: python recipes/instruct_data.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.data import instruct_files
from nemo_minitron.instruct_config import InstructDataRecipe

if __name__ == "__main__":
    recipe.main("instruct_data", InstructDataRecipe, instruct_files.check, instruct_files.run)
