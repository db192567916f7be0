"""`python -m nemo_minitron prune +conf=width` is `python recipes/prune.py +conf=width`."""

from __future__ import annotations

import sys

from nemo_minitron import __version__
from nemo_minitron.run.commands import main, use_environment
from nemo_minitron.run.registry import RECIPES


def command() -> None:
    """Run the recipe that the first argument names; the others are its own."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in RECIPES:
        sys.argv[1:] = arguments[1:]
        main(arguments[0])
    elif arguments and arguments[0] == "--version":
        print(f"nemo_minitron {__version__}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        use_environment()
        from nemo_minitron.run.help_text import overview  # needs packages of the environment

        print(overview())
    else:
        print(f"error: {arguments[0]}: must be one of {', '.join(RECIPES)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command()
