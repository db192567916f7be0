"""What the steps of a pipeline, or one run, will need: python recipes/plan_run.py +conf=minitron_width plan.gpu=a100"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("plan_run")
