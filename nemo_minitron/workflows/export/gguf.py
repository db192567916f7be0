"""A GGUF file: written, compared, and where its rounding is coarse run by llama.cpp beside F16."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.export import GGUF_PLAIN, ExportRecipe
from nemo_minitron.export import gguf_model, gguf_quantiser, huggingface, llama_cpp, written
from nemo_minitron.export.gguf_tokenizer import STOPS
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.export import verification
from nemo_minitron.workflows.export.check import Prepared, measured

_NAMED = 5


def file_name(kind: str) -> str:
    """Of the file in the directory: hubs read the type off it."""
    return f"model-{kind}.gguf"


def write(r: ExportRecipe, prepared: Prepared, place: Path) -> dict[str, Any]:
    """Write the file into a directory.

    Returns:
        Fields of `result.json`.
    """
    kind, vocabulary, model = r.export.quantization, prepared.vocabulary, prepared.model
    assert vocabulary is not None
    file = place / file_name(kind)
    if kind in GGUF_PLAIN:
        rows = _plain(prepared, file, kind).kept
    else:
        plain = place / file_name("F32")
        _plain(prepared, plain, "F32")
        gguf_quantiser.quantise(plain, file, kind)
        rows = gguf_quantiser.uneven(model, kind)
    return {
        "quantization": kind,
        "tokenizer_pre": vocabulary.pre,
        "stop_token_ids": [vocabulary.ids[role] for role in STOPS if role in vocabulary.ids],
        "stop_token_ids_left_out": vocabulary.stops_left_out,
        "rows_that_fit_no_block": len(rows),
        "rows_that_fit_no_block_first": dict(list(rows.items())[:_NAMED]),
        "weight_bytes": file.stat().st_size,
    }


def _plain(prepared: Prepared, file: Path, kind: str) -> gguf_model.Report:
    assert prepared.vocabulary is not None
    show = progress_bar("written", gguf_quantiser.estimate(prepared.model, kind, measured=False))
    return gguf_model.write(prepared.model, prepared.vocabulary, file, kind, show)


def verify(r: ExportRecipe, prepared: Prepared, place: Path) -> dict[str, Any]:
    """Compare what `write` wrote; leaves nothing but the file in the directory.

    Raises:
        FailedRun: logits differ.
        RuntimeError: llama.cpp does not run the file.
    """
    kind, count = r.export.quantization, r.export.verify_tokens
    plain = kind if kind in GGUF_PLAIN else "F32"
    fields = verification.of_gguf(prepared, place / file_name(plain), plain, count)
    if plain != kind:
        (place / file_name(plain)).unlink()
        fields |= verification.of_quantised(prepared, place / file_name(kind), count)
    if measured(r):
        fields |= _perplexities(r, prepared, place)
    return fields


def _perplexities(r: ExportRecipe, prepared: Prepared, place: Path) -> dict[str, Any]:
    """By llama.cpp, over text that no corpus of the recipes holds."""
    kind, source = r.export.quantization, prepared.source
    tokenizer = huggingface.load_tokenizer(source.tokenizer, source.architecture.vocab_size)
    context = min(source.seq_length, r.export.perplexity_tokens)
    ids = tokenizer.encode(written.text())[:context]
    beside = place / file_name("F16")
    _plain(prepared, beside, "F16")
    found = {}
    for name, file in (("perplexity_f16", beside), ("perplexity", place / file_name(kind))):
        with llama_cpp.opened(file, context) as server:
            found[name], tokens = llama_cpp.perplexity(
                server, ids, progress_bar(name, len(ids) - 1, unit="tokens")
            )
    beside.unlink()
    return {name: round(value, 4) for name, value in found.items()} | {"perplexity_tokens": tokens}
