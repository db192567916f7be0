"""Runs many recipes that shall be refused, each in a process of its own.

    python refusals.py < cases.json > answers.json

Starting Python and importing torch, transformers, Hydra and the recipes' checks costs seconds, so they are imported
once and each case is a fork: its own arguments, environment, stdout and stderr. NeMo is not among the imports: a case
that needs it has started work, and its answer says so.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Exit code, both streams, seconds, and whether NeMo was imported."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        pid = os.fork()
        if pid == 0:
            _child(case, Path(directory))
        _, status = os.waitpid(pid, 0)
        out, err = ((Path(directory) / name).read_text() for name in ("out", "err"))
        nemo = (Path(directory) / "nemo").exists()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": out, "err": err, "nemo": nemo, "seconds": time.monotonic() - begin}


def _child(case: dict[str, Any], directory: Path) -> None:
    code: Any = 0
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.environ.update(case["env"])
        sys.argv = [str(ROOT / "recipes" / f"{case['recipe']}.py"), *case["overrides"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if "nemo" in sys.modules:
        (directory / "nemo").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Answers to the cases on stdin, in order."""
    import megatron.core.datasets.indexed_dataset
    import torch  # noqa: F401
    import transformers
    from hydra.core.plugins import Plugins

    import nemo_minitron.run.main
    from nemo_minitron.run.registry import RECIPES

    assert nemo_minitron.run.main
    Plugins.instance()
    for name in RECIPES:
        importlib.import_module(f"nemo_minitron.workflows.{name}.check")
    # The lazy names that a check of a checkpoint touches.
    transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018
    assert megatron
    assert "nemo" not in sys.modules
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
