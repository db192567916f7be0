"""The recipes by name: `python recipes/NAME.py ...` in a clone is `python -m nemo_minitron NAME ...`, installed or not.

Only the standard library is imported before it is clear that the interpreter has the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# name: the schema; the module with `check` and `run`, or one of each
RECIPES = {
    "pretrain": ("config.recipes:PretrainRecipe", "workflows.pretrain.run"),
    "prune": ("config.recipes:PruneRecipe", "workflows.prune.run"),
    "search": ("config.recipes:SearchRecipe", "workflows.search.run"),
    "correct_teacher": ("config.recipes:CorrectTeacherRecipe", "workflows.correct_teacher.run"),
    "cache_teacher": ("config.recipes:CacheTeacherRecipe", "workflows.cache_teacher.run"),
    "synthesize": ("config.recipes:SynthesizeRecipe", "workflows.synthesize.run"),
    "distill": ("config.recipes:DistillRecipe", "workflows.distill.run"),
    "sft": ("config.align:SftRecipe", "workflows.align.sft"),
    "preference": ("config.align:PreferenceRecipe", "workflows.align.preference"),
    "export": ("config.export:ExportRecipe", "workflows.export.check workflows.export.run"),
    "chat": ("config.chat:ChatRecipe", "workflows.chat.check workflows.chat.run"),
    "instruct_data": ("config.instruct:InstructDataRecipe", "workflows.instruct_data.run"),
    "evaluate_instruct": ("config.instruct:EvaluateInstructRecipe", "workflows.evaluate_instruct.run"),
}
_PACKAGE = Path(__file__).resolve().parents[1]
_NEEDED = ("hydra", "torch", "megatron")
_HANDED_OVER = "NEMO_MINITRON_HANDED_OVER"


def resources() -> Path:
    """Where conf/ and assets/ are: the clone, or the package where it is installed."""
    return _PACKAGE.parent if (_PACKAGE.parent / "conf" / "common.yaml").is_file() else _PACKAGE


def main(name: str) -> None:
    """Run a recipe with the command line that is in sys.argv."""
    use_environment()
    schema, work = RECIPES[name]
    module, _, cls = schema.partition(":")
    run_recipe(name, f"nemo_minitron.{module}", cls, [f"nemo_minitron.{part}" for part in work.split()])


def run_recipe(name: str, schemas: str, schema: str, work: list[str]) -> None:
    """Import what a recipe needs, and hand over to `recipe.main`.

    Args:
        name: of conf/NAME.yaml.
        schemas: the module with the schema.
        schema: its name there.
        work: the module with `check` and `run`, or one of each.
    """
    from nemo_minitron.run import terminal

    terminal.quiet()
    try:
        from nemo_minitron.run import main as recipe

        described = getattr(importlib.import_module(schemas), schema)
        modules = [importlib.import_module(part) for part in work]
    except KeyboardInterrupt:
        print("\ninterrupted: before the run began", file=sys.stderr)
        sys.exit(terminal.INTERRUPTED_BY_USER)
    recipe.main(name, described, modules[0].check, modules[-1].run)


def use_environment() -> None:
    """Go on with the environment's interpreter where this one lacks the libraries: one line says so.

    Raises:
        SystemExit: there is no environment either; exit code 2 and one line.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    script = _PACKAGE.parent / "scripts" / "environment.sh"
    lacks = f"{sys.executable} lacks {', '.join(missing)}"
    if not script.is_file():
        _end(f"{lacks}, which pip installs with the package")
    found = subprocess.run([str(script), "find"], capture_output=True, text=True)
    python = found.stdout.strip()
    if found.returncode or not python or os.environ.get(_HANDED_OVER):
        _end(f"{lacks}, and there is no environment yet; make one with `make setup` in {_PACKAGE.parent}")
    print(f"{lacks}: going on with {python}", file=sys.stderr, flush=True)
    os.environ[_HANDED_OVER] = "1"
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
    os.execv(python, [python, *arguments])


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
