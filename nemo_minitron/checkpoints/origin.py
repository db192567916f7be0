"""Where a student came from: what its run, and those before it, wrote into their result.json."""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import CHECKPOINT, find_source
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, real, user_path

# Runs that change a student's weights, and whose own `student` is one step nearer to its source.
_TRAINED = ("distill", "sft", "preference")
_MOST_STEPS = 20


def absolute(path: str | Path) -> str:
    """Where a checkpoint lies, for those who look for it from elsewhere."""
    return str(real(path))


def teacher_of(student: str | Path, data: DataConfig | None = None) -> str:
    """The checkpoint that a student was pruned from, if it is still what it was.

    Args:
        student: as the user names it: a run directory, or the checkpoint in one.
        data: as `find_source`.

    Raises:
        InputError: the student does not say, or its source is gone or has other weights now.
    """
    where = f"teacher: student={student}"
    advice = "give teacher=DIR, or train on next tokens alone with distill.loss=cross_entropy"
    made = _pruned(user_path(student))
    if made is None:
        raise InputError(f"{where} does not say what it was pruned from; {advice}")
    source, sha256 = made
    try:
        found = find_source(source, "teacher", data)
    except InputError as error:
        raise InputError(
            f"{where} was pruned from {source}: {str(error).partition(': ')[2]}; {advice}"
        ) from None
    now = found.sha256()
    if now != sha256:
        raise InputError(
            f"{where} was pruned from {source}, which has other weights now (sha256 {now[:12]}, then {sha256[:12]}); "
            f"{advice}"
        )
    return source


def _pruned(run: Path) -> tuple[str, str] | None:
    """Path and sha256 of the source of the pruning that a run goes back to."""
    for _ in range(_MOST_STEPS):
        result = _result(run)
        if result.get("recipe") in _TRAINED and isinstance(result.get("student"), str):
            run = user_path(result["student"])
            continue
        source, sha256 = result.get("source"), result.get("source_sha256")
        return (source, sha256) if isinstance(source, str) and isinstance(sha256, str) else None
    return None


def _result(run: Path) -> dict[str, Any]:
    run = run.parent if run.name == CHECKPOINT else run
    try:
        found = json.loads(read_text(run / RESULT))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
