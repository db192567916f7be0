"""What a model was made of: its run, the runs before it, and the base model that they began with."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.gguf.reader import read_header
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, real, user_path

_MOST_STEPS = 20
_CHECKPOINT = "checkpoint"
_CARD = "README.md"
# Files of a base model that go along with each copy of it.
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)


@dataclass(frozen=True)
class Step:
    """A run that changed the model, and what it wrote; `command`: as the user typed it, "" where it is not kept."""

    directory: Path
    result: dict[str, Any]
    command: str
    configuration: str


@dataclass(frozen=True)
class Lineage:
    """The runs, last first, and what they began with.

    Attributes:
        base: the base model's directory or file; None for a model that was trained from scratch.
        base_name: its name on the hub, where its files say it.
        licence: as its files say it.
        legal: its files that go along with copies.
    """

    steps: list[Step] = field(default_factory=list)
    base: Path | None = None
    base_name: str | None = None
    licence: str | None = None
    legal: tuple[Path, ...] = ()


def lineage(source: str | Path) -> Lineage:
    """Where a checkpoint comes from.

    Args:
        source: as the user names it: a run, the checkpoint in one, a Hugging Face directory, a GGUF file.
    """
    path, steps = user_path(source), list[Step]()
    while len(steps) < _MOST_STEPS and (step := _step(path)) is not None:
        steps.append(step)
        before = changed_by(step.result)
        if not isinstance(before, str):
            return Lineage(steps)
        path = user_path(before)
    name, licence = _said_by(path)
    legal = (
        sorted(f for f in path.iterdir() if _LEGAL.fullmatch(f.name) and f.is_file()) if path.is_dir() else []
    )
    return Lineage(steps, path, name, licence, tuple(legal))


def changed_by(result: Mapping[str, Any]) -> Any:
    """The model that a run changed: a distillation names its teacher too, a correction nothing else."""
    return result.get("student") or result.get("source") or result.get("teacher")


def _step(path: Path) -> Step | None:
    run = path.parent if path.name == _CHECKPOINT else path
    try:
        result = json.loads(read_text(run / "result.json"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict):
        return None
    try:
        configuration = read_text(run / "config.yaml")
    except (OSError, ValueError):
        configuration = ""
    first = configuration.partition("\n")[0]
    return Step(run, result, first[2:] if first.startswith("# python ") else "", configuration)


def _said_by(base: Path) -> tuple[str | None, str | None]:
    """A base model's name on the hub and its licence, by its card or its metadata."""
    if base.is_file():
        return _of_gguf(base)
    name = _name_of_directory(base)
    try:
        from huggingface_hub import ModelCard

        said = ModelCard(read_text(base / _CARD), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return name, None
    licence = said.get("license")
    if licence == "other":
        licence = said.get("license_name") or licence
    return name, licence if isinstance(licence, str) else None


def _name_of_directory(base: Path) -> str | None:
    """Of a snapshot in the hub's cache: models--ORG--NAME/snapshots/..."""
    for part in real(base).parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return None


def _of_gguf(file: Path) -> tuple[str | None, str | None]:
    try:
        said = read_header(file, str(file)).metadata
    except (ImportError, InputError, OSError):
        return None, None
    url, licence = said.get("general.base_model.0.repo_url"), said.get("general.license")
    name = url.removeprefix("https://huggingface.co/") if isinstance(url, str) else None
    return name, licence if isinstance(licence, str) else None
