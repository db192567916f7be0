"""What can be refused of a pipeline before any of its steps runs: every step's configuration is composed."""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from nemo_minitron import scratch
from nemo_minitron.checkpoints.gguf import is_gguf
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.pipeline import PipelineRecipe
from nemo_minitron.environment import COMPOSE, with_package
from nemo_minitron.errors import InputError
from nemo_minitron.files import user_path
from nemo_minitron.workflows.one_process import OneProcess
from nemo_minitron.workflows.pipeline.foresight import check_ahead
from nemo_minitron.workflows.pipeline.state import State
from nemo_minitron.workflows.pipeline.steps import Step, content_of, key_of, steps_of

# What is typed for the pipeline and meant for each of its steps.
_SHARED = ("data", "trainer", "eval", "seed")


@dataclass(frozen=True)
class Prepared(OneProcess):
    """The steps, the key and the number of ranks of each by its name, the hash of the source's weights; `pipeline`: the
    file that lists the steps."""

    steps: list[Step]
    keys: dict[str, str]
    ranks: dict[str, int]
    source_sha256: str
    pipeline: str | None = None


def check(r: PipelineRecipe) -> Prepared:
    """Compose every step and find what has been made already.

    Raises:
        InputError: names the step and what is wrong with it; a source that is none; one that changed under finished
            steps.
    """
    source = user_path(r.source).absolute()
    content = functools.cache(content_of)  # several steps name the same teacher and corpus
    if not is_gguf(source):  # which the first step converts; its header is read below
        find_source(r.source)
    source_sha256 = content(source)
    if source_sha256 is None:
        raise InputError(f"source={r.source}: its weights cannot be read")
    run_dir = Path(r.run_dir).absolute()
    steps = steps_of(r.pipeline.steps, str(source), run_dir, shared_overrides())
    with ThreadPoolExecutor(max_workers=2) as pool:
        composed = list(pool.map(compose, steps))
    # A login node may lack what the jobs have.
    check_ahead(steps, composed, source, packages=r.cluster is None)
    keys: dict[str, str] = {}
    for step, line in zip(steps, composed, strict=True):
        keys[step.name] = key_of(step, line["config"], source, keys, content)
    state, name = State(run_dir), _chosen()
    state.check_source(r.source, source_sha256, overwrite=r.overwrite)
    state.check_pipeline(name, overwrite=r.overwrite)
    ranks = {step.name: line["ranks"] for step, line in zip(steps, composed, strict=True)}
    return Prepared(steps, keys, ranks, source_sha256, name)


def _chosen() -> str | None:
    """The file of the group `pipeline`."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return choices.get("pipeline")


def shared_overrides() -> list[str]:
    """What was typed of the groups that every recipe has."""
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [text for text in typed if text.lstrip("+~").partition("=")[0].split(".")[0] in _SHARED]


def command(step: Step) -> list[str]:
    """The command line of a step in one process."""
    return [sys.executable, "-m", "nemo_minitron", step.recipe, *step.overrides]


def compose(step: Step, *, complete: bool = True) -> Mapping[str, Any]:
    """A step's configuration as its recipe composes and checks it: `config`, `ranks`, `missing`.

    Args:
        complete: whether every key must have a value.

    Raises:
        InputError: what the recipe says.
    """
    with scratch.directory("composed") as place:
        file = place / "composed.jsonl"
        # What is there already is the pipeline's affair.
        done = subprocess.run(
            [*command(step), "overwrite=true"],
            env=with_package(**{COMPOSE: str(file)}),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InputError(f"pipeline.steps.{step.name}: {said.removeprefix('error: ')}")
        composed: dict[str, Any] = json.loads(file.read_text())
    if composed["missing"] and complete:
        raise InputError(f"pipeline.steps.{step.name}.set: lacks {', '.join(composed['missing'])}")
    return composed
