"""Train a Llama-architecture GPT from scratch: python recipes/pretrain.py model=demo trainer.max_steps=100"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron.run.commands import main

if __name__ == "__main__":
    main("pretrain")
