"""The work of `recipes/evaluate.py`: figures of the held-out text, then one benchmark after the other."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.any_family import AnyModel, load_directory
from nemo_minitron.checkpoints.origin import absolute
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.data.statistics import bits_per_byte
from nemo_minitron.data.tokenizer import tokenizer_sha256
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.evaluation.benchmarks import catalogue, harness
from nemo_minitron.evaluation.lm_figures import LMFigures, lm_figures, text_bytes
from nemo_minitron.evaluation.transformers_text import transformers_figures
from nemo_minitron.export.huggingface import generation_settings
from nemo_minitron.nemo.session import Session, nemo_tokenizer, packed
from nemo_minitron.nemo.teacher import Teacher
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.evaluate.asking import Asking, write_items
from nemo_minitron.workflows.evaluate.check import Prepared
from nemo_minitron.workflows.evaluate.model import ShardedModel

TEXT = "held_out_text"  # its file of items


def run(r: EvaluateRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Measure.

    Returns:
        The fields of `result.json`; `scores` has a row a metric.
    """
    fields: dict[str, Any] = {
        "recipe": "evaluate",
        "source": absolute(r.source),
        "source_sha256": prepared.source_sha256,
        "tokenizer_sha256": tokenizer_sha256(prepared.tokenizer),
        "backend": r.eval.backend,
        "precision": r.trainer.precision,
        "ranks": r.trainer.ranks,
    }
    if isinstance(prepared.source, AnyModel):
        fields |= _with_transformers(r, prepared, prepared.source, directory)
    else:
        fields |= _sharded(r, prepared, prepared.source, directory)
    return {**fields, "peak_rss_gib": peak_rss_gib()}


def _sharded(r: EvaluateRecipe, prepared: Prepared, source: Source, directory: Path) -> dict[str, Any]:
    # A single new token has no sequence to share.
    layout = dataclasses.replace(r.trainer, sequence_parallel=False)
    session = Session(source, layout)
    fields = _sizes(source.architecture.parameters(), source.architecture.non_embedding_parameters())
    if prepared.data is not None:
        fields |= _of_text(r, prepared, directory, lambda *given: _figures(r, prepared, session, *given))
    if prepared.wanted:
        fields |= _benchmarks(r, prepared, session, directory)
    return fields


def _with_transformers(
    r: EvaluateRecipe, prepared: Prepared, source: AnyModel, directory: Path
) -> dict[str, Any]:
    """By lm-evaluation-harness's hf backend, in one process."""
    model = load_directory(source.path, "float32" if r.trainer.precision == "32" else "bfloat16")
    if torch.cuda.is_available():
        model = model.cuda()
    fields = _sizes(source.parameters, source.non_embedding_parameters)
    size = r.trainer.micro_batch_size
    if prepared.data is not None:
        fields |= _of_text(
            r,
            prepared,
            directory,
            lambda dataset, samples, progress: transformers_figures(
                model, dataset, samples, batch_size=size, progress=progress
            ),
        )
    if prepared.benchmarks:
        _, backend_lm = harness.language_models()
        length, batch = source.seq_length, r.eval.batch_size
        asking = Asking(
            r,
            prepared,
            directory,
            lambda *told: backend_lm(model, prepared.tokenizer, length, batch, *told),
        )
        for benchmark in prepared.benchmarks:
            asking.ask(benchmark)
        fields |= asking.fields()
    return fields


def _sizes(parameters: int, non_embedding: int) -> dict[str, Any]:
    return {"params": parameters, "non_embedding_params": non_embedding}


def _of_text(
    r: EvaluateRecipe, prepared: Prepared, directory: Path, measure: Callable[..., LMFigures]
) -> dict[str, Any]:
    """Held-out text; `measure`: of the dataset, how many of its samples, and who is told the progress."""
    assert prepared.data is not None
    dataset = packed(prepared.data, r.data, "valid")
    samples = min(r.eval.samples or len(dataset), len(dataset))
    found = measure(dataset, samples, progress_bar("held-out text", samples, tokens=r.data.seq_length))
    if rank() == 0:
        rows = [
            {"item": number, "nats": nats, "tokens": tokens}
            for number, (nats, tokens) in enumerate(found.sequences)
        ]
        write_items(directory, TEXT, rows)
    return _text_fields(r, prepared, found, dataset)


def _figures(
    r: EvaluateRecipe, prepared: Prepared, session: Session, dataset: Any, samples: int, progress: Any
) -> LMFigures:
    teacher = None
    if prepared.teacher is not None:
        # Its output layer has the model's rows: both vocabularies are the same.
        tokenizer = nemo_tokenizer(prepared.teacher.tokenizer)
        strategy, length = session.trainer.strategy, r.data.seq_length
        teacher = [Teacher(prepared.teacher, strategy, tokenizer, length, session.layout.precision).chunk]
    return lm_figures(
        session.chunks,
        dataset,
        samples,
        session.architecture.vocab_size,
        batch_size=r.trainer.micro_batch_size,
        teacher=teacher,
        progress=progress,
    )


def _text_fields(r: EvaluateRecipe, prepared: Prepared, found: LMFigures, dataset: Any) -> dict[str, Any]:
    assert prepared.data is not None
    tokenizer, indexed = prepared.data.tokenizer, prepared.data.indexed
    size = text_bytes(
        dataset,
        found.samples,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )
    fields: dict[str, Any] = {
        "data": r.data.name,
        "data_sha256": indexed.manifest_sha256,
        "lm_seq_length": r.data.seq_length,
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
    source = session.source
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
    sharded_lm, _ = harness.language_models()
    asking = Asking(r, prepared, directory, lambda *told: sharded_lm(model, prepared.tokenizer, *told))
    for benchmark in benchmarks:
        asking.ask(benchmark)
    # The judge may take its time; the other ranks are not kept waiting for it.
    model.dismiss()
    return asking.fields()
