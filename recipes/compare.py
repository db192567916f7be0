"""Models side by side: scores with paired errors, size, speed: python recipes/compare.py models=[DIR,RUN]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("compare")
