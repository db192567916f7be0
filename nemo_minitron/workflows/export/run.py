"""The work of `recipes/export.py`: write, compare with the Megatron model, give the final name."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_minitron.config.export import ExportRecipe
from nemo_minitron.export import generation, huggingface, written
from nemo_minitron.export.target import under_another_name
from nemo_minitron.export.tensors import EMBEDDING
from nemo_minitron.run import main as recipe
from nemo_minitron.workflows.export.check import Prepared

# Largest difference of two logits, as a share of the largest logit if that is above 1.
TOLERANCE = 1e-4
_SEQUENCE = 128  # tokens


def run(r: ExportRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write the export; it gets its name once it has given the Megatron model's logits.

    Returns:
        The fields of `result.json`.
    """
    with under_another_name(prepared.target) as temporary:
        temporary.mkdir()
        begin = time.monotonic()
        files = huggingface.write(
            prepared.model, temporary, prepared.shard_bytes, _progress("written", prepared.model.bytes)
        )
        write_s, writing_gib = time.monotonic() - begin, recipe.peak_rss_gib()
        sizes = [file.stat().st_size for file in files]
        begin = time.monotonic()
        compared = verify(prepared, temporary, r.export.verify_tokens)
        verify_s = time.monotonic() - begin
    settings = generation.carried(prepared.target)
    return {
        "recipe": "export",
        "format": r.format,
        "source": str(r.source),
        "source_sha256": prepared.source_sha256,
        "params": prepared.source.architecture.parameters(),
        "dtype": str(prepared.model.dtype).removeprefix("torch."),
        "stop_token_ids": generation.ids_of(settings, "eos_token_id", prepared.target),
        "weight_files": len(files),
        "weight_bytes": sum(sizes),
        **compared,
        "write_s": round(write_s, 2),
        "verify_s": round(verify_s, 2),
        "peak_rss_gib_after_writing": writing_gib,
        "peak_rss_gib": recipe.peak_rss_gib(),
        "exported": str(prepared.target),
    }


def verify(prepared: Prepared, directory: Path, count: int) -> dict[str, Any]:
    """Compare logits over real text, both sides in float32 from the weights as they were written, a layer at a time.

    Raises:
        RuntimeError: they differ.
    """
    from nemo_minitron.workflows.export import layer_by_layer

    source, model = prepared.source, prepared.model
    vocab, layers = source.architecture.vocab_size, source.architecture.num_layers
    length = min(count, source.seq_length, _SEQUENCE)
    tokenizer = huggingface.load_tokenizer(directory, vocab)
    tokens = written.tokens_of(tokenizer, max(1, count // length), length)
    found = written.logits(directory, tokens, _progress("transformers", layers, "layers"))
    expected = layer_by_layer.logits(
        source,
        model.weights.reader,
        tokens,
        vocab_rows=model.weights.reader.size(EMBEDDING)[0],
        dtype=model.dtype,
        progress=_progress("Megatron", layers, "layers"),
    )
    return compare(found, expected[..., :vocab]) | {"verify_tokens": tokens.numel()}


def compare(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """How far logits of the same shape are from each other.

    Raises:
        RuntimeError: farther than `TOLERANCE`, or not finite.
    """
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    # A NaN is in no order.
    if not difference <= TOLERANCE * max(1.0, largest):
        raise RuntimeError(
            f"what was written gives other logits than the Megatron model: they differ by up to {difference:.3g} where "
            f"the largest is {largest:.3g}; nothing is left of it"
        )
    return {"verify_max_difference": difference, "verify_largest_logit": largest}


def _progress(label: str, total: int, unit: str = "B") -> Callable[[int], None]:
    import sys

    from tqdm import tqdm

    bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", file=sys.stderr, mininterval=1.0)

    def show(done: int) -> None:
        bar.update(done - bar.n)
        if bar.n >= total:
            bar.close()

    return show
