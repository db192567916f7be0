"""Search for the recipe of a merge: python recipes/evolve.py 'models=[A,B]' base=C"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("evolve")
