"""From a teacher to a model on a device, one run after the other: python recipes/pipeline.py +conf=minitron_width"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("pipeline")
