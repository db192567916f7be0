"""Cases of bad input: what they start from, what a user says, and what has to be in the answer."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """What a case may start from. `checkpoint`: the teacher's NeMo 2 directory."""

    home: Path
    huggingface: Path
    checkpoint: Path
    run_dir: Path
    pruned: Path

    def copy(self, name: str, source: Path) -> Path:
        """A checkpoint to damage, without its optimizer."""
        target = self.home / "bad" / name
        shutil.copytree(source, target)
        return target


@dataclass(frozen=True)
class Case:
    """Overrides after the usual ones, and the parts that the refusal has to have."""

    overrides: list[str] | Callable[[Places], list[str]]
    says: list[str]
    recipe: str = "prune"
    env: dict[str, str] = field(default_factory=dict)
    preset: str = "+conf=width"


RANKS = {"NEMO_MINITRON_NPROC": "2", "NEMO_MINITRON_PREPARE": "1"}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
