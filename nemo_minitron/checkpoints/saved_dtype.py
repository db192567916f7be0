"""The dtype in which weights lie in a checkpoint, whatever the model computes in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def cast(sharded: Any, dtype: str, *, lossless: bool = False) -> None:
    """Give all weights of a sharded state dict another dtype, in place; the model keeps its own.

    Args:
        sharded: of `sharded_state_dict`, nested.
        dtype: in torch's word, such as "bfloat16".
        lossless: keep a weight as it is where the dtype does not hold its values.
    """
    if isinstance(sharded, dict | list | tuple):
        for value in sharded.values() if isinstance(sharded, dict) else sharded:
            cast(value, dtype, lossless=lossless)
    elif isinstance(sharded, ShardedTensor | ShardedTensorFactory):
        data = sharded.data
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            new = data.detach().to(getattr(torch, dtype))
            if not lossless or torch.equal(new.to(data.dtype), data):
                sharded.data = new
                if isinstance(sharded, ShardedTensor):
                    sharded.dtype = new.dtype


def name_dtype(model: Any, dtype: str) -> None:
    """Let the context that is saved with a NeMo model say its weights' dtype, in torch's word."""
    config, found = model.__io__.config, getattr(torch, dtype)
    config.params_dtype = config.pipeline_dtype = found
    config.bf16, config.fp16 = dtype == "bfloat16", dtype == "float16"


@contextmanager
def saving_in(trainer: Any, model: Any, dtype: str, *, lossless: bool = False) -> Iterator[None]:
    """Within it, the trainer's checkpoints hold weights of this dtype, and their context names it.

    Args:
        trainer: NeMo's.
        model: its NeMo model.
        dtype, lossless: as `cast`.
    """
    io = trainer.strategy.checkpoint_io
    save = io.save_checkpoint

    def cast_first(checkpoint: dict[str, Any], *rest: Any, **options: Any) -> Any:
        cast(checkpoint.get("sharded_state_dict"), dtype, lossless=lossless)
        return save(checkpoint, *rest, **options)

    name_dtype(model, dtype)
    io.save_checkpoint = cast_first
    try:
        yield
    finally:
        del io.save_checkpoint
