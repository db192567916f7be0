"""Write a checkpoint for other programs to open: python recipes/export.py source=RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.export_config import ExportRecipe
from nemo_minitron.workflows.export import check, run

if __name__ == "__main__":
    recipe.main("export", ExportRecipe, check.check, run.run)
