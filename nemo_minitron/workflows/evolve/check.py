"""What `recipes/evolve.py` refuses, and prepares, before a model is loaded."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.evolve import EvolveRecipe
from nemo_minitron.data.beginning import beginning
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.evaluation.benchmarks import catalogue
from nemo_minitron.evaluation.benchmarks.catalogue import Benchmark, Wanted
from nemo_minitron.evaluation.multiple_choice import Task, load_task
from nemo_minitron.merging.evolution import check_package, check_size
from nemo_minitron.merging.settings import PATH, Merge
from nemo_minitron.merging.spaces import Layers, Parameters
from nemo_minitron.workflows.merge import check as merging
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted, say_corpus

PARAMETERS, LAYERS, BOTH = "parameters", "layers", "both"


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded.

    Attributes:
        merging: the models.
        source: the first of them in NeMo 2 form, for what a model is made of beside its weights.
        data: of the fitness "lm_loss"; `task`, `held_out`: of "task"; `wanted`, `benchmark`: of "benchmark", whose
            items one rank reads.
    """

    merging: merging.Prepared
    source: Source
    tokenizer: Any
    data: PreparedData | None
    task: Task | None
    held_out: Task | None
    wanted: Wanted | None
    benchmark: Benchmark | None

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "models_sha256": self.merging.sha256,
            "data": None if self.data is None else self.data.to_config(),
        }


def check(r: EvolveRecipe) -> Prepared:
    """Refuse what cannot work; convert a checkpoint, index the data, read the questions.

    Raises:
        InputError: names the value.
    """
    check_package()
    merge = merging.merge_of(r)
    _check_space(r, merge)
    _check_layout(r)
    ready = r.prepared
    prepared = merging.prepare(r, merge, ready)
    if len(set(prepared.sha256)) == 1:
        raise InputError(
            f"models: {', '.join(prepared.named)} have the same weights: there is nothing to search for"
        )
    first, named = prepared.sources[0], prepared.named[0]
    for source in prepared.sources:
        check_source("model", source, r.trainer, r.data.seq_length if r.evolve.fitness == "lm_loss" else 1)
    data = _data(r, first, ready)
    tokenizer = load_tokenizer(prepared.tokenizer)
    task, held_out = _tasks(r, tokenizer, first)
    wanted, benchmark = _benchmark(r, ready, tokenizer, named)
    return Prepared(prepared, converted(first, r.data), tokenizer, data, task, held_out, wanted, benchmark)


def _check_space(r: EvolveRecipe, merge: Merge) -> None:
    e = r.evolve
    if merge.method == PATH:
        raise InputError("merge.method=path: is what evolve.space=layers searches for; choose another method")
    if e.space != LAYERS:
        check_size(Parameters(merge, e.groups), f"merge.method={merge.method} with evolve.groups={e.groups}")
    if e.space == LAYERS and merge.base is not None:
        raise InputError(
            f"base={merge.base}: evolve.space=layers lays out models and has no base; say merge=linear and leave it "
            "out, or name it among the models"
        )


def _check_layout(r: EvolveRecipe) -> None:
    t = r.trainer
    if r.evolve.space != PARAMETERS and t.pipeline_model_parallel_size > 1:
        raise InputError(
            f"trainer.pipeline_model_parallel_size={t.pipeline_model_parallel_size}: paths of any length are tried on "
            f"one stage; must be 1 for evolve.space={r.evolve.space}"
        )
    if t.context_parallel_size > 1:
        raise InputError(
            f"trainer.context_parallel_size={t.context_parallel_size}: must be 1, evolve has no context parallelism"
        )


def layers_space(r: EvolveRecipe, layers: tuple[int, ...]) -> Layers:
    """The space of paths through models of so many layers."""
    e = r.evolve
    return Layers(layers, e.repeats, e.scales, e.scale_range)


def _data(r: EvolveRecipe, source: Source, ready: dict[str, Any] | None) -> PreparedData | None:
    if r.evolve.fitness != "lm_loss":
        return None
    data = prepare_data(r.data, str(source.tokenizer), (ready or {}).get("data"))
    check_vocabulary(source, data)
    say_corpus(r.data, data, prepared=bool(ready), what="measures candidates")
    return data


def _tasks(r: EvolveRecipe, tokenizer: Any, source: Source) -> tuple[Task | None, Task | None]:
    e = r.evolve
    if e.fitness != "task":
        return None, None
    if e.task_file is None or e.held_out_file is None:
        raise InputError(
            "evolve.fitness=task: needs evolve.task_file=FILE to search by and evolve.held_out_file=FILE for the result"
        )
    begin = beginning(tokenizer, r.data.bos)
    with of_setting("evolve.task_file"):
        task = load_task(e.task_file, tokenizer, source.seq_length, beginning=begin)
    with of_setting("evolve.held_out_file"):
        held_out = load_task(e.held_out_file, tokenizer, source.seq_length, beginning=begin)
    if task.sha256 == held_out.sha256:
        raise InputError(
            f"evolve.held_out_file={e.held_out_file}: holds the questions of evolve.task_file; give others"
        )
    return task, held_out


def _benchmark(
    r: EvolveRecipe, ready: dict[str, Any] | None, tokenizer: Any, named: str
) -> tuple[Wanted | None, Benchmark | None]:
    e = r.evolve
    if e.fitness != "benchmark":
        return None, None
    if e.benchmark is None:
        raise InputError("evolve.fitness=benchmark: needs evolve.benchmark=NAME")
    (wanted,) = catalogue.parse_names([e.benchmark])
    if wanted.judged:
        raise InputError(
            f"evolve.benchmark={e.benchmark}: is rated by a judge; choose one that is scored here"
        )
    if wanted.chat and not tokenizer.chat_template:
        raise InputError(
            f"{named}: has no chat template, and evolve.benchmark={e.benchmark} asks by messages"
        )
    return wanted, None if ready else catalogue.load([wanted], r.data)[0]
