"""What was written beside the Megatron model: logits over real text, both sides in float32, a layer at a time."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_minitron.checkpoints.families import architecture_of
from nemo_minitron.errors import FailedRun
from nemo_minitron.export import gguf_model, huggingface, written
from nemo_minitron.export.tensors import EMBEDDING
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.export import layer_by_layer
from nemo_minitron.workflows.export.check import Prepared

# Largest difference of two logits, as a share of the largest logit if that is above 1.
TOLERANCE = 1e-4
_SEQUENCE = 128  # tokens


def of_directory(prepared: Prepared, place: Path, count: int) -> dict[str, Any]:
    """Compare a Hugging Face directory.

    Args:
        count: of tokens.

    Raises:
        FailedRun: logits differ, or other tensors are there.
    """
    dtype = prepared.model.dtype
    config, read = written.directory_read(place, prepared.model.weights.parts)
    return _verify(prepared, config, read, count, lambda weight: weight.to(dtype).float())


def of_gguf(prepared: Prepared, file: Path, kind: str, count: int) -> dict[str, Any]:
    """Compare a GGUF file of a type that is packed here, with the Megatron model rounded alike.

    Args:
        kind: one of `gguf_model.KINDS`.
        count: of tokens.

    Raises:
        FailedRun: logits differ, or other tensors are there.
    """
    config, read = written.gguf_read(file, architecture_of)
    return _verify(prepared, config, read, count, gguf_model.rounding(kind))


def of_quantised(prepared: Prepared, file: Path, count: int) -> dict[str, Any]:
    """How far what llama.cpp made of a verified file is from the Megatron model.

    Raises:
        FailedRun: it gives a number that is not finite.
    """
    config, read = written.gguf_read(file, architecture_of)
    found = _verify(prepared, config, read, count, lambda weight: weight, tolerance=sys.float_info.max)
    return {"quantized_max_difference": found["verify_max_difference"]}


def tokens_of(prepared: Prepared, count: int) -> Tensor:
    """Real text, int64 [b, s]."""
    source = prepared.source
    length = min(count, source.seq_length, _SEQUENCE)
    tokenizer = huggingface.load_tokenizer(source.tokenizer, source.architecture.vocab_size)
    return written.tokens_of(tokenizer, max(1, count // length), length)


def _verify(
    prepared: Prepared,
    config: Any,
    read: written.Read,
    count: int,
    rounded: Callable[[Tensor], Tensor],
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Compare logits.

    Args:
        config, read: of what was written, as `written.logits` takes them.
        rounded: what became of a weight when it was written.
    """
    source, reader, tokens = prepared.source, prepared.model.weights.reader, tokens_of(prepared, count)
    vocab, layers = source.architecture.vocab_size, source.architecture.num_layers
    found = written.logits(config, read, tokens, progress_bar("transformers", layers, unit="layers"))
    expected = layer_by_layer.logits(
        source,
        reader,
        tokens,
        vocab_rows=reader.size(EMBEDDING)[0],
        rounded=rounded,
        progress=progress_bar("Megatron", layers, unit="layers"),
    )
    return compare(found, expected[..., :vocab], tolerance) | {"verify_tokens": tokens.numel()}


def compare(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """How far logits of the same shape are from each other.

    Raises:
        FailedRun: farther than the tolerance, or not finite.
    """
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    # A NaN is in no order.
    if not (difference <= tolerance * max(1.0, largest) and math.isfinite(difference)):
        raise FailedRun(
            f"what was written gives other logits than the Megatron model: they differ by up to {difference:.3g} where "
            f"the largest is {largest:.3g}; nothing is left of it"
        )
    return {"verify_max_difference": difference, "verify_largest_logit": largest}
