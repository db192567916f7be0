"""The steps of a pipeline as command lines: who needs whom, what each is made of, and the hash of all that."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.pipeline import StepConfig
from nemo_minitron.errors import InputError
from nemo_minitron.files import file_sha256

SOURCE = "source"
_REFERENCE = re.compile(r"@([\w-]+(?:\|@[\w-]+)*)(/.*)?")
_NAME = re.compile(r"[A-Za-z_][\w-]*")
# Where a run writes, and what it may find there: no part of what it makes.
_NO_INPUTS = ("run_dir", "overwrite", "prepared", "cluster")


@dataclass(frozen=True)
class Step:
    """A run to be made: `overrides` of its recipe's command line, `directory` of the run, `needs`: earlier steps."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    directory: Path
    needs: tuple[str, ...]


def steps_of(
    configured: Mapping[str, StepConfig], source: str, run_dir: Path, shared: list[str]
) -> list[Step]:
    """The steps that are on, in their order.

    Args:
        configured: by name.
        source: the pipeline's teacher.
        run_dir: of the pipeline; each step gets a directory of its name in it.
        shared: overrides that every step gets first.

    Raises:
        InputError: names the step: a name that is none, or one that needs what no step before it makes.
    """
    made: list[Step] = []
    for name, step in configured.items():
        if not _NAME.fullmatch(name) or name == SOURCE:
            raise InputError(
                f"pipeline.steps.{name}: is no name for a step; letters, digits, _ and - are legal"
            )
        if step.on:
            earlier = {SOURCE: source} | {before.name: str(before.directory) for before in made}
            made.append(_step(name, step, shared, run_dir, _References(set(configured), earlier)))
    if not made:
        raise InputError("pipeline.steps: nothing is on; choose a preset, +conf=minitron_width")
    return made


def _step(name: str, step: StepConfig, shared: list[str], run_dir: Path, references: "_References") -> Step:
    given = [f"+conf={step.preset}"] if step.preset else []
    given += [f"{group}={file}" for group, file in step.choose.items()]
    for key, value in _flat(step.set):
        given.append(f"{key}={_typed(references.resolved(value, f'pipeline.steps.{name}.set.{key}'))}")
    overrides = (*shared, *given, f"run_dir={run_dir / name}")
    return Step(name, step.recipe, overrides, run_dir / name, tuple(dict.fromkeys(references.taken)))


@dataclass
class _References:
    """What `@NAME` may stand for.

    Args:
        known: the names of all steps, also of those that are off.
        earlier: the directory of each step that runs before, and the source.
        taken: the steps that were referred to so far.
    """

    known: set[str]
    earlier: Mapping[str, str]
    taken: list[str] = field(default_factory=list)

    def resolved(self, value: Any, place: str) -> Any:
        """A value with paths for references; of a list those that are off are left out."""
        if isinstance(value, list):
            return [self.resolved(item, place) for item in value if not self._is_off(item)]
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        if (found := _REFERENCE.fullmatch(value)) is None:
            raise InputError(f"{place}={value}: @STEP, @source or @STEP|@OTHER is legal")
        names = found[1].split("|@")
        for name in names:
            if name in self.earlier:
                self.taken += [name] if name != SOURCE else []
                return self.earlier[name] + (found[2] or "")
        off = [f"{name} is off" if name in self.known else f"there is no step {name}" for name in names]
        raise InputError(f"{place}={value}: {', '.join(off)} before it; @source or an earlier step is legal")

    def _is_off(self, item: Any) -> bool:
        name = str(item).removeprefix("@")
        return str(item).startswith("@") and name in self.known and name not in self.earlier


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _typed(value: Any) -> str:
    """A value as a user would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return str(value)


def key_of(
    step: Step,
    config: Mapping[str, Any],
    source: Path,
    keys: Mapping[str, str],
    content: Callable[[Path], str | None],
) -> str:
    """Hex sha256 of all that a step's result comes from: its configuration, the files that names, the steps it needs.

    Args:
        config: composed and resolved.
        source: of the pipeline, as it stands in `config`.
        keys: of the steps before.
        content: `content_of`, perhaps with a memory.
    """
    plain = {name: value for name, value in config.items() if name not in _NO_INPUTS}
    inputs = {
        "recipe": step.recipe,
        "config": plain,
        "source": content(source),
        "needs": {name: keys[name] for name in step.needs},
        "files": dict(_files(plain, step.directory.parent, content)),
    }
    text = json.dumps(inputs, sort_keys=True, default=str)
    # Where the pipeline and its source lie is no input: a directory that was moved is not made again.
    for place, name in ((step.directory.parent, "@"), (source, "@source")):
        text = re.sub(rf'"{re.escape(json.dumps(str(place))[1:-1])}(?=[/"])', f'"{name}', text)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(config: Any, run_dir: Path, content: Callable[[Path], str | None]) -> Iterator[tuple[str, str]]:
    """(path, hash) of what a configuration names outside of the pipeline's own directory."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name != "cache_dir":
                yield from _files(value, run_dir, content)
    elif isinstance(config, list):
        for value in config:
            yield from _files(value, run_dir, content)
    elif isinstance(config, str) and config and not Path(config).is_relative_to(run_dir):
        for path in sorted(glob(config, recursive=True)) or [config]:
            if (found := content(Path(path))) is not None:
                yield path, found


def content_of(path: Path) -> str | None:
    """Hex sha256 of a file or a checkpoint; None for what is neither."""
    try:
        if path.is_file():
            return file_sha256(path)
        return find_source(path).sha256() if path.is_dir() else None
    except (InputError, OSError):
        return None
