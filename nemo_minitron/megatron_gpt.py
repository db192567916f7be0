"""A Megatron GPT model inside its wrappers, its layers, and Megatron's forward-only schedule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from nemo_minitron.errors import InputError


def gpt_model(chunk: Any) -> Any:
    """The GPTModel inside wrappers that keep it in `.module` (DDP, Float16Module, NeMo's).

    Not by its attributes: NeMo's DDP passes those of the model on.

    Raises:
        InputError: it has no decoder with layers.
    """
    inner = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(getattr(inner, "decoder", None), "layers"):
        raise InputError(f"{type(chunk).__name__}: not a Megatron GPT model, it has no decoder with layers")
    return inner


def decoder_of(chunk: Any) -> Any:
    """Megatron's TransformerBlock inside a model chunk.

    Raises:
        InputError: as `gpt_model`.
    """
    return gpt_model(chunk).decoder


def layers_of(decoder: Any) -> Iterator[tuple[int, Any]]:
    """(global 0-based index, layer) of the layers that this rank holds."""
    for layer in decoder.layers:
        yield layer.layer_number - 1, layer


def no_loss(output: Tensor) -> Any:
    """What a schedule wants of a step that computes no loss."""
    return output.new_zeros(()), {}


def forward_only(
    step: Callable[[Iterator[Any], Any], tuple[Tensor, Callable[[Tensor], Any]]],
    chunks: Sequence[Any],
    microbatches: Sequence[Any],
    shape: tuple[int, int],
) -> list[Any]:
    """Megatron's schedule without gradients' part; every stage calls.

    Args:
        step: Megatron's `forward_step_func`: takes the iterator of microbatches and a chunk, gives the output and what
            to make of it on the last stage (`no_loss`).
        chunks: of this rank; one for each virtual stage.
        microbatches: as `step` takes them.
        shape: (b, s) of a microbatch; s is the whole sequence's.

    Returns:
        On the last stage what the second half of `step` said of each microbatch.

    Source: megatron/core/pipeline_parallel/schedules.py@0.13.1 (`get_forward_backward_func`).
    """
    # Late: checks import this module, and no Megatron.
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=True,
    )
