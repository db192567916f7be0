"""What a step of a recipe computes, out of its configuration and the sizes of the models that it opens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import PRUNABLE
from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.sizes import Sizes, sizes_of
from nemo_minitron.config.align import PreferenceRecipe, SftRecipe
from nemo_minitron.config.budget import settle_tokens
from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.config.recipes import (
    CacheTeacherRecipe,
    CorrectTeacherRecipe,
    DistillRecipe,
    PretrainRecipe,
    PruneRecipe,
    SearchRecipe,
    merged,
)
from nemo_minitron.data.sequences import schedules
from nemo_minitron.errors import InputError
from nemo_minitron.planning.memory import Training
from nemo_minitron.search.candidates import Candidate, Workload, candidates, check_grid, make_budget
from nemo_minitron.workflows.correct_teacher.check import training_of
from nemo_minitron.workflows.distill.settings import CROSS_ENTROPY
from nemo_minitron.workflows.prune import plans
from nemo_minitron.workflows.search.check import short_distillation

# What is measured where `eval.samples` is null: a whole split, of which nothing is known here.
_SAMPLES = 64


@dataclass(frozen=True)
class Pass:
    """`tokens` through a model without gradients."""

    model: Architecture
    tokens: int


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        model: what it leaves behind; None where it makes no model.
        training: None where nothing is trained; `trainings`: how many times.
        passes: forward passes beside the training's own.
        length: tokens of a sequence; micro_batch: sequences of a pass; precision: the trainer's.
        stream: whether passes go a layer at a time, with no whole model in memory.
        unknown: what it also does and is not counted.
    """

    model: Architecture | None = None
    training: Training | None = None
    trainings: int = 1
    passes: list[Pass] = field(default_factory=list)
    length: int = 512
    micro_batch: int = 1
    precision: str = "32"
    stream: bool = False
    unknown: str = ""

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return self.trainings * self.training.tokens if self.training else 0

    @property
    def pass_flops(self) -> float:
        """Of the passes, over all ranks."""
        return float(sum(each.tokens * each.model.flops_per_token(self.length) for each in self.passes))


@dataclass
class Models:
    """The sizes of checkpoints by their path; those that earlier steps will leave are told, others are read."""

    known: dict[str, Sizes] = field(default_factory=dict)

    def at(self, path: Any, key: str) -> Sizes:
        """Of what a key names.

        Raises:
            InputError: nothing is named, or there is no model.
        """
        text = str(path or "")
        if not text or text.startswith("<"):
            raise InputError(
                f"{key}: name a checkpoint, or a directory with its config.json; what is not made yet is planned as a "
                "step of a pipeline"
            )
        if text not in self.known:
            self.known[text] = sizes_of(text, key)
        return self.known[text]


def work_of(recipe: str, config: Mapping[str, Any], models: Models) -> Work:
    """What a run of a recipe with a composed configuration computes; of recipes that compute next to nothing, nothing.

    Raises:
        InputError: names the key: a model that is not there, sizes that cannot be made.
    """
    if recipe not in _KINDS:
        return Work(unknown=_UNKNOWN.get(recipe, ""))
    schema, describe = _KINDS[recipe]
    parsed = _parsed(schema, config)
    settle_tokens(parsed)
    return describe(parsed, models)


def _parsed(schema: Any, config: Mapping[str, Any]) -> Any:
    """A configuration as its schema has it; a path that is not given holds its own key in angle brackets.

    Raises:
        InputError: a number that is not given.
    """
    found = merged(schema, {**config, "cluster": None})
    for key in sorted(OmegaConf.missing_keys(found)):
        try:
            OmegaConf.update(found, key, f"<{key}>")
        except ValidationError:
            raise InputError(f"{key}: has no value; a plan needs a number") from None
    return OmegaConf.to_object(found)


def _common(r: Any) -> dict[str, Any]:
    return {
        "length": r.data.seq_length,
        "micro_batch": r.trainer.micro_batch_size,
        "precision": r.trainer.precision,
    }


def _measured(r: Any) -> int:
    """Tokens of one LM loss."""
    return (r.eval.samples or _SAMPLES) * r.data.seq_length


def _prune(r: PruneRecipe, models: Models) -> Work:
    source, p = models.at(r.source, "source").architecture, r.prune
    target, keep = plans.resolve(p, source)
    scored = 0.0
    if p.scores is None and p.importance == "activation":
        scored = 1.0
        if keep is None and target.num_layers < source.num_layers and p.layer_metric in ("lm_loss", "task"):
            scored += source.num_layers / 2
    tokens = int(scored * p.iterations * p.calibration_samples * r.data.seq_length)
    after = (1 + p.control_seeds) * _measured(r)
    passes = [Pass(source, tokens + _measured(r)), Pass(target, after)]
    if r.stream and not scored:  # from file to file, without a pass
        return Work(target, stream=True, unknown=_UNKNOWN["export"], **_common(r))
    return Work(target, passes=passes, stream=r.stream, **_common(r))


def _distill(r: DistillRecipe, models: Models) -> Work:
    student = models.at(r.student, "student").architecture
    live = r.distill.loss != CROSS_ENTROPY and r.teacher_cache is None
    teacher = _teacher(r, models) if live else None
    d = r.distill
    training = Training(
        student,
        teacher,
        d.max_steps,
        d.global_batch_size,
        r.data.seq_length,
        r.trainer.precision,
        on_states=d.loss != CROSS_ENTROPY,
        shared_optimizer=d.optim.use_distributed_optimizer,
    )
    plan = schedules(d.max_steps, d.global_batch_size, d.val_check_interval, d.limit_val_batches)
    seen = (plan["valid"].drawn - plan["valid"].used) * r.data.seq_length  # of it NeMo draws one more
    passes = [Pass(student, seen + (1 if d.from_scratch else 2) * _measured(r))]
    if teacher is not None:
        passes.append(Pass(teacher, seen + _measured(r)))
    return Work(student, training, passes=passes, **_common(r))


def _teacher(r: DistillRecipe, models: Models) -> Architecture:
    named = r.teacher or origin.teacher_of(r.student, r.data)
    return models.at(named, "teacher").architecture


def _correct_teacher(r: CorrectTeacherRecipe, models: Models) -> Work:
    models.at(r.teacher, "teacher")
    return _distill(training_of(r), models)


def _cache_teacher(r: CacheTeacherRecipe, models: Models) -> Work:
    teacher, d = models.at(r.teacher, "teacher").architecture, r.distill
    plan = schedules(d.max_steps, d.global_batch_size, d.val_check_interval, d.limit_val_batches)
    train = r.cache.train_samples or plan["train"].used
    samples = train + (r.cache.valid_samples or plan["valid"].used)
    tokens = samples * r.data.seq_length + _measured(r)
    return Work(None, passes=[Pass(teacher, tokens)], stream=r.stream, **_common(r))


def _pretrain(r: PretrainRecipe, models: Models) -> Work:
    m, t = r.model, r.trainer
    fields = {name: value for name, value in vars(m).items() if name != "init_method_std"}
    model = Architecture(**fields, vocab_size=r.data.vocab_size)
    training = Training(
        model,
        None,
        t.max_steps,
        t.global_batch_size,
        r.data.seq_length,
        t.precision,
        shared_optimizer=r.optim.use_distributed_optimizer,
    )
    return Work(model, training, passes=[Pass(model, _measured(r))], **_common(r))


def _sft(r: SftRecipe, models: Models, *, pairs: bool = False) -> Work:
    student, a = models.at(r.student, "student").architecture, r.align
    if a.max_steps is None:
        raise InputError(
            "align.max_steps=null: how long a pass over the data is, is not known here; say a number"
        )
    training = Training(
        student,
        None,
        a.max_steps,
        a.global_batch_size,
        r.data.seq_length,
        r.trainer.precision,
        shared_optimizer=a.optim.use_distributed_optimizer,
        sequences=2 if pairs else 1,
        reference=pairs,
    )
    said = "validations; conversations are shorter than data.seq_length, so this is the most"
    return Work(student, training, passes=[Pass(student, 2 * _measured(r))], unknown=said, **_common(r))


def _preference(r: PreferenceRecipe, models: Models) -> Work:
    return _sft(r, models, pairs=True)


def _search(r: SearchRecipe, models: Models) -> Work:
    """Every candidate has the size of the largest: they use most of one budget."""
    source, s, p = models.at(r.source, "source").architecture, r.search, r.prune
    tried = _candidates(r, source)
    largest = tried[0].architecture
    passes = [Pass(source, p.calibration_samples * r.data.seq_length + _measured(r))]
    passes += [Pass(candidate.architecture, _measured(r)) for candidate in tried]
    training, learning = None, min(s.distill_candidates or len(tried), len(tried))
    if s.distill_steps:
        models.known.setdefault("largest", Sizes(largest, r.data.seq_length))
        training = _distill(short_distillation(r, "largest", r.run_dir), models).training
    return Work(largest, training, max(learning, 1), passes, **_common(r))


def _candidates(r: SearchRecipe, source: Architecture) -> list[Candidate]:
    s = r.search
    fixed = {axis: [v] for axis in PRUNABLE if (v := getattr(r.prune, axis)) is not None}
    load = Workload(s.context, s.sequences, s.bytes_per_value)
    budget = make_budget(source, s.budget or {}, s.slack, load)
    found = candidates(source, {**fixed, **check_grid(s.grid or {})}, budget, load)
    return found[: s.max_candidates if s.method == "grid" else s.trials]


def _evaluate(r: EvaluateRecipe, models: Models) -> Work:
    passes = []
    if r.eval.lm:
        named = {"source": r.source, "teacher": r.teacher}
        passes = [Pass(models.at(p, key).architecture, _measured(r)) for key, p in named.items() if p]
    return Work(passes=passes, unknown="benchmarks" if r.eval.tasks else "", **_common(r))


_KINDS: dict[str, tuple[Any, Callable[[Any, Models], Work]]] = {
    "prune": (PruneRecipe, _prune),
    "distill": (DistillRecipe, _distill),
    "correct_teacher": (CorrectTeacherRecipe, _correct_teacher),
    "cache_teacher": (CacheTeacherRecipe, _cache_teacher),
    "pretrain": (PretrainRecipe, _pretrain),
    "sft": (SftRecipe, _sft),
    "preference": (PreferenceRecipe, _preference),
    "search": (SearchRecipe, _search),
    "evaluate": (EvaluateRecipe, _evaluate),
}
_UNKNOWN = {
    "evaluate_instruct": "text that is written a token at a time",
    "synthesize": "text that is written a token at a time",
    "chat": "text that is written a token at a time",
    "report": "text that is written a token at a time",
    "export": "reading and writing",
    "merge": "reading and writing",
    "evolve": "the candidates of a search",
    "compare": "evaluations of several models, one after the other",
}


def left_behind(work: Work, config: Mapping[str, Any], models: Models, directory: Path) -> None:
    """Let later steps find the model that a step will leave in its run directory."""
    if work.model is not None:
        models.known[str(directory)] = Sizes(work.model, config["data"]["seq_length"])
