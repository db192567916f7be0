"""The one stand-in layer: a norm that knows sequence parallelism and zero-centred gamma.

megatron-core 0.13.1 has such norms only with Transformer Engine or Apex; its torch norm refuses both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class HostNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with Megatron's arguments.

    Input and output [s/tp, b, h] under sequence parallelism, [s, b, h] else, in the input's dtype. `weight` (and, for
    LayerNorm, `bias`) [h] is replicated on every tensor-parallel rank and marked `sequence_parallel`, so that Megatron
    sums its gradient over the ranks that saw different tokens (`finalize_model_grads`, megatron-core@0.13.1).
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization {config.normalization!r}: LayerNorm and RMSNorm are known")
        self.normalized_shape, self.eps = (hidden_size,), eps
        self.rms = config.normalization == "RMSNorm"
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = self._parameter(torch.full((hidden_size,), 1.0 - self.offset), config)
        self.bias = None if self.rms else self._parameter(torch.zeros(hidden_size), config)

    @staticmethod
    def _parameter(value: Tensor, config: Any) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(value.to(config.params_dtype))
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x [..., h] over h, same shape and dtype."""
        weight = self.weight + self.offset if self.offset else self.weight
        shape = tuple(weight.shape)
        if self.rms:
            if x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32:
                return _RmsNorm.apply(x, weight, self.eps)
            return F.rms_norm(x, shape, weight, self.eps)
        return F.layer_norm(x, shape, weight, self.bias, self.eps)


class _RmsNorm(torch.autograd.Function):
    """RMSNorm in float32. torch's own keeps the normed input besides the input (torch 2.13.0, CPU), a hidden state for
    each norm, and walks through memory twice as often; this one makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        )
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        normed = x * scale
        product = grad * normed
        to_weight = product.reshape(-1, x.size(-1)).sum(0) if of_weight else None
        if not of_x:
            return None, to_weight, None
        along = torch.mv(product.reshape(-1, x.size(-1)), weight).div_(x.size(-1)).view_as(scale)
        return (grad * weight).addcmul_(normed, along, value=-1).mul_(scale), to_weight, None
