"""What `recipes/evaluate.py` refuses, and prepares, before a model is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_minitron.checkpoints.any_family import AnyModel, find_any
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import catalogue, judged
from nemo_minitron.evaluation.benchmarks.catalogue import Benchmark, Wanted
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted, say_corpus


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded; sources are of kind "nemo", or what the hf backend opens.

    Attributes:
        source_sha256: of the source's weights as they were named.
        tokenizer: of Hugging Face, the source's own.
        data: None where no held-out text is read.
        benchmarks: their items read; None on ranks that a launcher started, of which one reads them.
    """

    source: Source | AnyModel
    source_sha256: str
    tokenizer: Any
    teacher: Source | None
    data: PreparedData | None
    wanted: list[Wanted]
    benchmarks: list[Benchmark] | None

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "source": str(self.source.path),
            "source_sha256": self.source_sha256,
            "teacher": None if self.teacher is None else str(self.teacher.path),
            "data": None if self.data is None else self.data.to_config(),
        }


def check(r: EvaluateRecipe) -> Prepared:
    """Refuse what cannot be measured; convert the checkpoints, index the data and read the benchmarks once.

    Raises:
        InputError: names the value.
    """
    found = examine(r, read_benchmarks=r.prepared is None)
    if isinstance(found.source, AnyModel):
        return found
    teacher = None if found.teacher is None else converted(found.teacher, r.data)
    return dataclasses.replace(found, source=converted(found.source, r.data), teacher=teacher)


def examine(r: EvaluateRecipe, *, read_benchmarks: bool) -> Prepared:
    """All of `check` but the conversion; sources are as they were found.

    Args:
        read_benchmarks: false leaves `benchmarks` None.

    Raises:
        InputError: names the value.
    """
    ready, e = r.prepared or {}, r.eval
    wanted = _wanted(r)
    source = _source(r, ready)
    tokenizer = load_tokenizer(source.tokenizer)
    _check_chat(r, wanted, tokenizer)
    benchmarks = catalogue.load(wanted, r.data) if read_benchmarks else None
    teacher = _teacher(r, source, ready)
    data = prepare_data(r.data, str(source.tokenizer), ready.get("data")) if e.lm else None
    if data is not None:
        check_vocabulary(source, data)
        say_corpus(r.data, data, prepared=bool(ready), what="is measured")
    sha256 = ready.get("source_sha256") or source.sha256()
    return Prepared(source, sha256, tokenizer, teacher, data, wanted, benchmarks)


def _wanted(r: EvaluateRecipe) -> list[Wanted]:
    e, t = r.eval, r.trainer
    if t.context_parallel_size > 1:
        raise InputError(
            f"trainer.context_parallel_size={t.context_parallel_size}: must be 1, evaluate has no context parallelism"
        )
    wanted = catalogue.parse_names(e.tasks, allow_code=e.allow_code)
    if not wanted and not e.lm:
        raise InputError("eval.tasks, eval.lm: nothing is left to be measured")
    labels = [one.label for one in wanted]
    for key, values in (("limits", e.limits), ("new_tokens", e.new_tokens)):
        if unknown := [name for name in values or () if name not in labels]:
            among = ", ".join(labels) or "none"
            raise InputError(f"eval.{key}={unknown[0]}: is not among eval.tasks; those are {among}")
    if any(one.judged for one in wanted):
        judged.check_judge(e.judge)
    return wanted


def _source(r: EvaluateRecipe, ready: dict[str, Any]) -> Source | AnyModel:
    length = r.data.seq_length if r.eval.lm else 1
    if r.eval.backend == "megatron":
        source = find_source(ready.get("source", r.source), data=r.data)
        check_source("source", source, r.trainer, length)
        return source
    if r.trainer.ranks > 1:
        raise InputError(f"eval.backend=hf: works in one process, not on {r.trainer.ranks} ranks")
    for key in ("reset_attention_mask", "reset_position_ids"):
        if r.eval.lm and getattr(r.data, key):
            raise InputError(f"data.{key}=true: eval.backend=hf reads whole sequences; must be false")
    found = find_any(r.source)
    if length > found.seq_length:
        raise InputError(f"data.seq_length={length}: the source was made for {found.seq_length} tokens")
    return found


def _teacher(r: EvaluateRecipe, source: Source | AnyModel, ready: dict[str, Any]) -> Source | None:
    if r.teacher is None:
        return None
    if isinstance(source, AnyModel):
        raise InputError(f"teacher={r.teacher}: eval.backend=hf measures one model; leave it out")
    if not r.eval.lm:
        raise InputError("teacher: is compared with on the held-out text, which eval.lm=false leaves out")
    teacher = find_source(ready.get("teacher") or r.teacher, "teacher", r.data)
    check_source("teacher", teacher, r.trainer, r.data.seq_length)
    if teacher.architecture.vocab_size != source.architecture.vocab_size:
        raise InputError(
            f"teacher={r.teacher}: its vocabulary has {teacher.architecture.vocab_size} tokens, the source's "
            f"{source.architecture.vocab_size}: must be the same"
        )
    return teacher


def chat_of(r: EvaluateRecipe, wanted: Wanted) -> bool:
    """Whether a benchmark's questions are put as messages."""
    return wanted.chat if r.eval.chat_template is None else r.eval.chat_template


def _check_chat(r: EvaluateRecipe, wanted: list[Wanted], tokenizer: Any) -> None:
    if tokenizer.chat_template:
        return
    if asking := [one.label for one in wanted if chat_of(r, one) or one.judged]:
        raise InputError(
            f"source={r.source}: has no chat template, and {', '.join(asking)} ask by messages; "
            "eval.chat_template=false asks in plain text"
        )
