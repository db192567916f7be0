"""The recipes by name: `python recipes/NAME.py ...` in a clone is `python -m nemo_minitron NAME ...`, installed or not.

Only the standard library is imported before it is clear that the interpreter has the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from nemo_minitron.environment import INTERRUPTED_BY_USER
from nemo_minitron.run.registry import PACKAGE, RECIPES

_NEEDED = ("hydra", "torch", "megatron")
_HANDED_OVER = "NEMO_MINITRON_HANDED_OVER"


def main(name: str) -> None:
    """Run a recipe with the command line that is in sys.argv."""
    use_environment()
    module, _, schema = RECIPES[name].partition(":")
    run_recipe(name, f"nemo_minitron.config.{module}", schema, f"nemo_minitron.workflows.{name}")


def run_recipe(name: str, schemas: str, schema: str, work: str) -> None:
    """Hand over to `recipe.main`; what a recipe checks is imported when it is to be checked, what it runs after that.

    Args:
        name: of conf/NAME.yaml.
        schemas: the module with the schema.
        schema: its name there.
        work: the package with `check` and `run`.
    """
    from nemo_minitron.run import terminal  # after the hand-over to the environment

    terminal.quiet()
    try:
        from nemo_minitron.run import main as recipe  # imports Hydra; listing recipes does not

        described = getattr(importlib.import_module(schemas), schema)
    except KeyboardInterrupt:
        print("\ninterrupted: before the run began", file=sys.stderr)
        sys.exit(INTERRUPTED_BY_USER)

    def work_of(part: str) -> Callable[..., Any]:
        return lambda *given: getattr(importlib.import_module(f"{work}.{part}"), part)(*given)

    # Composing and --help need neither.
    recipe.main(name, described, work_of("check"), work_of("run"))


def use_environment() -> None:
    """Go on with the environment's interpreter where this one lacks the libraries: one line says so.

    Raises:
        SystemExit: there is no environment either; exit code 2 and one line.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    script = PACKAGE.parent / "scripts" / "environment.sh"
    lacks = f"{sys.executable} lacks {', '.join(missing)}"
    if not script.is_file():
        _end(f"{lacks}, which pip installs with the package")
    found = subprocess.run([str(script), "find"], capture_output=True, text=True)
    python = found.stdout.strip()
    if found.returncode or not python or os.environ.get(_HANDED_OVER):
        _end(f"{lacks}, and there is no environment yet; make one with `make setup` in {PACKAGE.parent}")
    print(f"{lacks}: going on with {python}", file=sys.stderr, flush=True)
    os.environ[_HANDED_OVER] = "1"
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
    os.execv(python, [python, *arguments])


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
