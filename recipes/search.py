"""Search for the best sizes inside a budget: python recipes/search.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import recipe
from nemo_minitron.config import SearchRecipe
from nemo_minitron.nemo import search

if __name__ == "__main__":
    recipe.main("search", SearchRecipe, search.check, search.run)
