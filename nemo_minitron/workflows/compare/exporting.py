"""A process that makes the Hugging Face form of a NeMo 2 checkpoint, once, into the cache: JSON on stdin, its path as
the last line of stdout. Only this needs NeMo, and its memory goes back before a speed is measured."""

import json
import sys

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.nemo.huggingface import exported_once


def main() -> None:
    """Read, export, print."""
    asked = json.load(sys.stdin)
    data = DataConfig(cache_dir=asked["cache_dir"])
    print(exported_once(find_source(asked["path"], "models", data), cache_dir(data, "exports")))


if __name__ == "__main__":
    main()
