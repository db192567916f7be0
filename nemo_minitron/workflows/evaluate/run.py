"""The work of `recipes/evaluate.py`: figures of the held-out text, then one benchmark after the other."""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.data.statistics import bits_per_byte
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.evaluation.benchmarks import catalogue
from nemo_minitron.evaluation.lm_figures import LMFigures, lm_figures, text_bytes
from nemo_minitron.export.huggingface import generation_settings
from nemo_minitron.nemo.session import Session, nemo_tokenizer, packed
from nemo_minitron.nemo.teacher import Teacher
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.evaluate.asking import Asking
from nemo_minitron.workflows.evaluate.check import Prepared
from nemo_minitron.workflows.evaluate.model import ShardedModel


def run(r: EvaluateRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Measure.

    Returns:
        The fields of `result.json`; `scores` has a row a metric.
    """
    # A single new token has no sequence to share.
    layout = dataclasses.replace(r.trainer, sequence_parallel=False)
    session = Session(prepared.source, layout)
    fields: dict[str, Any] = {
        "recipe": "evaluate",
        "source": str(r.source),
        "source_sha256": prepared.source_sha256,
        "params": prepared.source.architecture.parameters(),
        "precision": r.trainer.precision,
        "ranks": r.trainer.ranks,
    }
    if prepared.data is not None:
        fields |= _of_text(r, prepared, session)
    if prepared.wanted:
        fields |= _benchmarks(r, prepared, session, directory)
    return {**fields, "peak_rss_gib": peak_rss_gib()}


def _of_text(r: EvaluateRecipe, prepared: Prepared, session: Session) -> dict[str, Any]:
    assert prepared.data is not None
    dataset = packed(prepared.data, r.data, "valid")
    samples = min(r.eval.samples or len(dataset), len(dataset))
    teacher = None
    if prepared.teacher is not None:
        # Its output layer has the model's rows: both vocabularies are the same.
        tokenizer = nemo_tokenizer(prepared.teacher.tokenizer)
        strategy, length = session.trainer.strategy, r.data.seq_length
        teacher = [Teacher(prepared.teacher, strategy, tokenizer, length, session.layout.precision).chunk]
    found = lm_figures(
        session.chunks,
        dataset,
        samples,
        session.architecture.vocab_size,
        batch_size=r.trainer.micro_batch_size,
        teacher=teacher,
        progress=progress_bar("held-out text", samples, tokens=r.data.seq_length),
    )
    return _text_fields(r, prepared, found, dataset)


def _text_fields(r: EvaluateRecipe, prepared: Prepared, found: LMFigures, dataset: Any) -> dict[str, Any]:
    tokenizer = prepared.data.tokenizer if prepared.data is not None else prepared.tokenizer
    size = text_bytes(
        dataset,
        found.samples,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )
    fields: dict[str, Any] = {
        "data": r.data.name,
        "lm_tokens": found.tokens,
        "lm_samples": found.samples,
        "lm_bytes": size,
        "lm_loss_nats": found.nats,
        "lm_loss_stderr": found.stderr,
        "perplexity": found.perplexity,
        "bits_per_byte": bits_per_byte(found.nats, found.tokens, size),
        "token_accuracy": found.accuracy,
    }
    if found.kl is not None:
        fields |= {
            "teacher": str(r.teacher),
            "kl_from_teacher_nats": found.kl,
            "top1_agreement": found.agreement,
            "lm_loss_nats_teacher": found.teacher_nats,
        }
    return fields


def _benchmarks(r: EvaluateRecipe, prepared: Prepared, session: Session, directory: Path) -> dict[str, Any]:
    """All of them on rank 0, which has the items; the others take part in what the model does."""
    source = prepared.source
    settings = generation_settings(source.tokenizer, source.architecture.vocab_size)
    ends = settings.get("eos_token_id")
    model = ShardedModel(
        session,
        prepared.tokenizer,
        [*(ends if isinstance(ends, list) else [ends]), prepared.tokenizer.eos_token_id],
        r.eval.batch_size,
    )
    if rank() != 0:
        model.serve()
        return {}
    benchmarks = (
        catalogue.load(prepared.wanted, r.data) if prepared.benchmarks is None else prepared.benchmarks
    )
    asking = Asking(r, prepared, model, directory)
    for benchmark in benchmarks:
        asking.ask(benchmark)
    # The judge may take its time; the other ranks are not kept waiting for it.
    model.dismiss()
    return asking.fields()
