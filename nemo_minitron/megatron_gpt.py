"""A Megatron GPT model inside its wrappers, its layers, and Megatron's forward-only schedule."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nemo_minitron import parallel
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


def give_hidden_states(model: Any) -> None:
    """Let a GPTModel return its final hidden states, [s, b, h] or [s/tp, b, h], unless labels are given; on the last
    stage."""
    own = model._postprocess

    def postprocess(hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if labels is not None:
            return own(hidden_states, *args, labels=labels, **kwargs)
        return hidden_states

    model._postprocess = postprocess


def output_weight(model: Any) -> Tensor:
    """The rank's rows of a GPTModel's output layer, [v/tp, h]; on the last stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


@contextmanager
def giving_hidden_states(model: Any) -> Iterator[None]:
    """`give_hidden_states` for as long as the block lasts."""
    own = model._postprocess
    give_hidden_states(model)
    try:
        yield
    finally:
        model._postprocess = own


def final_hidden_states(chunks: Sequence[Any], batch: dict[str, Tensor]) -> Tensor | None:
    """One forward-only schedule over a microbatch; every stage calls.

    Args:
        batch: `tokens`, `position_ids` int64 [b, s], perhaps `attention_mask` bool [b, 1, s, s].

    Returns:
        The final norm's output [s, b, h], the whole sequence's also under sequence parallelism, on the last stage; None
        on others.
    """
    found: list[Tensor] = []

    def step(iterator: Iterator[dict[str, Tensor]], chunk: Any) -> Any:
        given = next(iterator)
        output = chunk(given["tokens"], given["position_ids"], given.get("attention_mask"))
        if gpt_model(chunk).post_process:
            found.append(output)
        return output, no_loss

    last = gpt_model(chunks[-1])
    b, s = batch["tokens"].shape
    with giving_hidden_states(last):
        forward_only(step, chunks, [batch], (b, s))
    if not found:
        return None
    return parallel.gather_sequence(found[0]) if last.config.sequence_parallel else found[0]
