"""The work of `recipes/evaluate.py`: figures of the held-out text, then one benchmark after the other."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.statistics import bits_per_byte
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.evaluation.benchmarks import catalogue, harness
from nemo_minitron.evaluation.benchmarks.adapter import ShardedLM
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.lm_figures import LMFigures, lm_figures, text_bytes
from nemo_minitron.export.huggingface import generation_settings
from nemo_minitron.files import write_text
from nemo_minitron.nemo.session import Session, nemo_tokenizer, packed
from nemo_minitron.nemo.teacher import Teacher
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.evaluate.check import Prepared, chat_of
from nemo_minitron.workflows.evaluate.model import ShardedModel

ITEMS = "items"


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
    fields = _asked(r, prepared, model, benchmarks, directory)
    model.dismiss()
    return fields


def _asked(
    r: EvaluateRecipe,
    prepared: Prepared,
    model: ShardedModel,
    benchmarks: list[catalogue.Benchmark],
    directory: Path,
) -> dict[str, Any]:
    answers = Answers(_answers_file(r, prepared) if r.eval.cache else None)
    bar = tqdm(total=0, unit="request", file=sys.stderr, mininterval=1.0 if sys.stderr.isatty() else 10.0)

    def asked(count: int) -> None:
        bar.total += count
        bar.refresh()

    lm = ShardedLM(model, prepared.tokenizer, answers, asked, bar.update)
    rows: list[harness.Row] = []
    begin = time.monotonic()
    for benchmark in benchmarks:
        bar.set_description_str(benchmark.wanted.label)
        chat = chat_of(r, benchmark.wanted)
        how = harness.Settings(r.eval.limit, chat, r.eval.max_new_tokens)
        found, items = harness.run(lm, benchmark, how)
        _keep(directory / ITEMS / f"{benchmark.wanted.label}.jsonl", items)
        rows += found
    bar.close()
    for row in rows:
        print(_line(row), flush=True)
    return {
        "scores": [row.to_config() for row in rows],
        "requests": bar.n,
        "requests_known_before": answers.before,
        "questions_cut": lm.cut,
        "benchmarks_s": round(time.monotonic() - begin, 2),
        "limit": r.eval.limit,
    }


def _answers_file(r: EvaluateRecipe, prepared: Prepared) -> Path:
    """Of these weights in this precision."""
    return cache_dir(r.data, "answers") / f"{prepared.source_sha256[:32]}-{r.trainer.precision}.jsonl"


def _keep(file: Path, items: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_text(file, "".join(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items))


def _line(row: harness.Row) -> str:
    error = "" if row.stderr is None else f" +- {row.stderr:.3f}"
    chance = f" (chance {row.chance:.3f}{'; AT CHANCE' if row.at_chance else ''})" if row.chance else ""
    return f"{row.task}: {row.metric} {row.score:.3f}{error} of {row.items:,} items{chance}"
