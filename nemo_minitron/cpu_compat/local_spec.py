"""Gaps of the layer spec without Transformer Engine (megatron-core 0.13.1, nemo_toolkit 2.4.1), with CUDA or not."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


def transformer_engine_imports() -> bool:
    """Whether NeMo and megatron-core will find Transformer Engine; asked as they ask."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError):  # OSError: a build for another CUDA
        return False
    return True


def close_gaps() -> None:
    """Apply every gap of this file, in order."""
    local_norm_refuses_sequence_parallel()
    local_attention_keeps_all_scores()
    steps_want_a_mask()


def close_megatrons() -> None:
    """Those of megatron-core, for work that never imports NeMo."""
    local_norm_refuses_sequence_parallel()
    local_attention_keeps_all_scores()


def local_norm_refuses_sequence_parallel() -> None:
    """`WrappedTorchNorm` asserts against sequence parallelism and zero-centred gamma. `HostNorm` does both. Megatron
    holds the class by name in the layer specs' backend and in the block's final norm."""
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import torch_norm, transformer_block

    from nemo_minitron.cpu_compat.norm import HostNorm  # imports Megatron

    _replace(
        torch_norm.WrappedTorchNorm, HostNorm, (torch_norm, backends, gpt_layer_specs, transformer_block)
    )


def local_attention_keeps_all_scores() -> None:
    """`DotProductAttention` keeps [b, n, s, s] scores and asserts against windows. `HostAttention` does neither.
    Megatron holds the class by name in the layer specs' backend."""
    from megatron.core.models import backends
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from nemo_minitron.cpu_compat import attention  # imports Megatron

    if attention.is_wanted():
        _replace(DotProductAttention, attention.HostAttention, (backends,))


def steps_want_a_mask() -> None:
    """Without Transformer Engine `gpt_forward_step` (`gpt/model/base.py`) asserts that the batch has an attention mask,
    bool [b, 1, s, s], though the local attention knows causality without one."""
    from nemo.collections.llm.gpt.model.base import GPTModel

    step = GPTModel.forward_step

    def forward_step(self: Any, batch: Any) -> Any:
        return step(self, batch if "attention_mask" in batch else {**batch, "attention_mask": None})

    GPTModel.forward_step = forward_step


def _replace(old: Any, new: Any, modules: Iterable[Any]) -> None:
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
