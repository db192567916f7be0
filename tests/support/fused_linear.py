"""A stand-in for Transformer Engine's fused norm and linear (TELayerNormColumnParallelLinear), for the CPU.

It has that layer's shape and parameter names: the norm of the input, then the column-parallel linear. Nothing
of Transformer Engine itself runs in the tests.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class FusedNormLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear with `layer_norm_weight` (and `layer_norm_bias`) [h] before it."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = self._vector(config)
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = self._vector(config)

    def _vector(self, config: Any) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(self.input_size, dtype=config.params_dtype))
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True) if self.config.normalization == "LayerNorm" else x
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.config.layernorm_epsilon)
        weight = self.layer_norm_weight + (1.0 if self.config.layernorm_zero_centered_gamma else 0.0)
        y = centred * scale * weight + getattr(self, "layer_norm_bias", 0.0)
        return super().forward(y, *args, **kwargs)
