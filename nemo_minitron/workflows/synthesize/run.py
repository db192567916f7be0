"""The work of `recipes/synthesize.py`: a teacher writes text that students can be fine-tuned on."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_minitron import parallel
from nemo_minitron.config.recipes import SynthesizeRecipe
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.errors import InputError
from nemo_minitron.files import write_text
from nemo_minitron.progress import progress_bar
from nemo_minitron.synthesis import report
from nemo_minitron.synthesis.filters import Text, TextFilter
from nemo_minitron.synthesis.mixture import TEXT
from nemo_minitron.synthesis.store import Written, batch_seed
from nemo_minitron.workflows.synthesize.check import Prepared
from nemo_minitron.workflows.synthesize.generators import make_generator


def run(r: SynthesizeRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write what is missing, then filter and judge all of it.

    Returns:
        The fields of `result.json`.

    Raises:
        InputError: no text passes the filters; the samples stay, for other settings of them.
    """
    if rank() == 0:
        prepared.store.begin()
    tokens, seconds = _write(r, prepared)
    parallel.barrier()
    found = _judge(r, prepared, directory) if rank() == 0 else {}
    parallel.barrier()
    t = r.trainer
    return {
        "recipe": "synthesize",
        "teacher": str(r.teacher),
        "teacher_sha256": prepared.store.manifest["teacher_sha256"],
        "backend": r.synthesize.backend,
        "prompts": r.synthesize.prompts or f"{r.data.name}: {r.synthesize.openings}",
        "prompts_sha256": prepared.store.manifest["prompts_sha256"],
        "seed": r.seed,
        **found,
        "write_s": round(seconds, 2),
        "tokens_written_now": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "ranks": t.ranks,
        "tensor_model_parallel_size": t.tensor_model_parallel_size,
        "pipeline_model_parallel_size": t.pipeline_model_parallel_size,
        "peak_rss_gib": peak_rss_gib(),
        "text": str((directory / TEXT).resolve()),
    }


def _write(r: SynthesizeRecipe, prepared: Prepared) -> tuple[int, float]:
    """Write the batches that are missing, shared by data-parallel ranks; new tokens of all ranks, and seconds."""
    prompts, store = prepared.prompts.tokens, prepared.store
    if r.trainer.ranks == 1 and not store.missing():
        return 0, 0.0

    writer = make_generator(r, prepared.teacher, max(map(len, prompts)))
    parallel.barrier()  # rank 0 has made the directory ready, and the next: nobody writes before all have looked
    missing = store.missing()
    parallel.barrier()
    mine = missing[parallel.dp_rank() :: parallel.dp_size()]
    show = progress_bar("writing", len(mine) * r.synthesize.batch_size)
    begin, tokens = time.monotonic(), 0
    for done, number in enumerate(mine, start=1):
        samples = _batch(r, prepared, writer, number)
        tokens += sum(len(sample.new) for sample in samples)
        if parallel.tp_rank() == 0 and parallel.pp_rank() == 0:
            store.write(number, samples)
        if show is not None:
            show(done * r.synthesize.batch_size)
    return sum(parallel.gather_objects(tokens, "dp")), time.monotonic() - begin


def _batch(r: SynthesizeRecipe, prepared: Prepared, writer: Any, number: int) -> list[Written]:
    s, prompts = r.synthesize, prepared.prompts.tokens
    indices = range(number * s.batch_size, min((number + 1) * s.batch_size, s.samples))
    chosen = [prompts[i % len(prompts)] for i in indices]
    written = writer.write(chosen, batch_seed(r.seed, number))
    return [Written(i, p, *found) for i, p, found in zip(indices, chosen, written, strict=True)]


def _judge(r: SynthesizeRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Filter, write RUN/text/train.jsonl and the report, and say what the result tells of them."""
    s = r.synthesize
    written = list(prepared.store.read())
    text_filter = TextFilter(s)
    kept = text_filter.keep(_text(prepared.tokenizer, sample) for sample in written)
    if not kept:
        dropped = ", ".join(f"{count} {name}" for name, count in text_filter.dropped.items() if count)
        raise InputError(
            f"nothing is left of {len(written)} samples ({dropped}); {prepared.store.directory} keeps them: change "
            "synthesize.min_new_tokens, synthesize.max_repetition or synthesize.near_duplicate_jaccard and run again"
        )
    rows = [
        {
            "text": t.prompt + t.new if s.include_prompt else t.new,
            "index": t.written.index,
            "ended": t.written.ended,
        }
        for t in kept
    ]
    path = directory / TEXT
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    quality = report.quality(s, written, kept, text_filter.dropped, _reference(prepared, kept))
    shown = report.excerpts(kept, s.excerpts)
    write_text(directory / "report.json", json.dumps({**quality, "excerpts": shown}, indent=2) + "\n")
    write_text(directory / "report.md", report.markdown(quality, shown))
    print(directory / "report.md", file=sys.stderr)
    return quality


def _text(tokenizer: Any, sample: Written) -> Text:
    prompt, both = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (sample.prompt, sample.prompt + sample.new)
    )
    # Where tokens are cut, the last may be a part of a character.
    prompt = prompt.rstrip("\ufffd")
    new = both[len(prompt) :]
    return Text(sample, prompt, new if sample.ended else new.rstrip("\ufffd"))


def _reference(prepared: Prepared, kept: list[Text]) -> list[tuple[list[int], str]]:
    """As many tokens of the corpus as were kept, in pieces of the same lengths."""
    if prepared.data is None:
        return []
    (prefix,) = prepared.data.indexed.paths("train")
    tokens = np.memmap(f"{prefix}.bin", dtype=IndexedDataset(prefix).index.dtype, mode="r")
    pieces, at = [], 0
    for text in kept:
        piece = [int(i) for i in tokens[at : at + len(text.written.new)]]
        pieces.append((piece, prepared.tokenizer.decode(piece, skip_special_tokens=True)))
        at += len(piece)
    return pieces if at == sum(len(text.written.new) for text in kept) else []
