"""Core attention without Transformer Engine: torch's `scaled_dot_product_attention`, whose memory is linear in the
sequence, in the place of megatron-core's local `DotProductAttention`, which keeps the scores [b, n, s, s].

Causal attention needs no mask: none is made. Windows, document limits and queries that follow cached keys are walked in
blocks of queries. Dropout and queries that may see no key (left padding) are left to Megatron's module.
NEMO_MINITRON_ATTENTION=megatron leaves all to it.
"""

import copy
import functools
import logging
import math
import os
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

SWITCH = "NEMO_MINITRON_ATTENTION"
BLOCK = 256
logger = logging.getLogger("nemo_minitron")


def no_mask(device: torch.device) -> Tensor:
    """A mask [1, 1, 1, 1] that stands for none, where a library's code insists on a tensor."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def is_wanted() -> bool:
    """Whether the environment leaves torch's attention on."""
    return os.environ.get(SWITCH, "torch") != "megatron"


class HostAttention(DotProductAttention):
    """Megatron's `DotProductAttention` (megatron-core@0.13.1) by torch, with its arguments and no parameters."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        without_window = config
        if config.window_size is not None:
            without_window = copy.copy(config)
            without_window.window_size = None
        super().__init__(without_window, *args, **kwargs)
        self.config = config
        # Megatron divides by the layer's number before the product and multiplies after it, for fp16's range.
        self.scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Context [sq, b, n/tp * d] of query [sq, b, n/tp, d], key and value [sk, b, groups/tp, d], one dtype.

        Args:
            attention_mask: bool [b or 1, 1, sq, sk], true where attention is forbidden; None: causal, unless
                the module's type (or `attn_mask_type`, as inference with cached keys says) is another. `no_mask`: None.
        """
        if attention_mask is not None and attention_mask.numel() == 1 < key.size(0):
            attention_mask = None  # `no_mask`
        causal = self._is_causal(attention_mask, query.size(0), key.size(0))
        mask = None if causal else attention_mask
        reason = self._unfit(mask, attention_bias, packed_seq_params)
        if reason is None and not _finite(query, key):
            reason = "a value that is not finite"
        if reason:
            _say_once(reason)
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        context = self._attend(*_by_group(query, key, value), causal, mask)
        # [b * groups, n / groups, sq, d] -> [sq, b, n * d]
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _unfit(self, mask: Tensor | None, bias: Tensor | None, packed: Any) -> str | None:
        """Why Megatron's own module is to do this; it refuses biases and packed sequences itself."""
        if self.training and self.attention_dropout.p > 0:
            return "attention dropout"
        if bias is not None or packed is not None:
            return "a bias or packed sequences"
        if mask is not None and bool(mask.all(-1).any()):
            return "queries that may see no key"
        if mask is not None and self.config.window_size is not None:
            return "a mask beside a window"
        return None

    def _is_causal(self, mask: Tensor | None, sq: int, sk: int) -> bool:
        """Whether query i sees keys 0 to sk - sq + i and no other."""
        if sq == 1 and mask is None:
            return False  # the newest token sees all keys
        if mask is None:
            return self.attn_mask_type == AttnMaskType.causal
        return sq > 1 and bool((mask == _forbidden(0, sq, 0, sk, sk - sq, None, mask.device)).all())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        """Context [b * groups, heads of a group, sq, d] of what `_by_group` gives."""
        sq, sk, window = q.size(2), k.size(2), self._left(q.size(2), k.size(2))
        if window is None and mask is None and (not causal or sq == sk):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)
        blocks = []
        for begin in range(0, sq, BLOCK):
            end = min(begin + BLOCK, sq)
            first = 0 if window is None else max(0, sk - sq + begin - window)
            last = sk - sq + end if causal else sk
            if mask is None:
                allowed = ~_forbidden(begin, end, first, last, sk - sq, window, q.device)
            else:
                allowed = ~_rows(mask, begin, end, q.size(0))
            keys, values = k[:, :, first:last], v[:, :, first:last]
            blocks.append(
                F.scaled_dot_product_attention(
                    q[:, :, begin:end], keys, values, attn_mask=allowed, scale=self.scale
                )
            )
        return torch.cat(blocks, dim=2)

    def _left(self, sq: int, sk: int) -> int | None:
        """How many keys before its own a query sees; None: all."""
        window = self.config.window_size
        return None if window is None or window[0] < 0 or window[0] >= sk else int(window[0])


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[b * groups, heads of a group, s, d] each, as views: the heads of a group share its keys without a copy."""
    sq, b, heads, d = query.shape
    groups = key.size(2)
    q = query.reshape(sq, b * groups, heads // groups, d).permute(1, 2, 0, 3)

    def shared(tensor: Tensor) -> Tensor:
        return tensor.flatten(1, 2).permute(1, 0, 2).unsqueeze(1).expand(-1, heads // groups, -1, -1)

    return q, shared(key), shared(value)


def _finite(query: Tensor, key: Tensor) -> bool:
    """Whether queries and keys are finite. Torch's kernel for CPUs (2.13.0) gives numbers where a score is NaN, and so
    would hide what has gone wrong; an overflow of the sums only sends finite ones to Megatron's module."""
    if query.device.type != "cpu":
        return True
    return math.isfinite(float(query.detach().sum()) + float(key.detach().sum()))


def _forbidden(
    begin: int, end: int, first: int, last: int, offset: int, window: int | None, device: torch.device
) -> Tensor:
    """bool [end - begin, last - first]: where queries begin..end may not see keys first..last. Query i stands at key
    `offset` + i, sees none after it, and with a window none further back than that."""
    places = torch.arange(begin + offset, end + offset, device=device).unsqueeze(1)
    keys = torch.arange(first, last, device=device)
    forbidden = keys > places
    return forbidden if window is None else forbidden | (keys < places - window)


def _rows(mask: Tensor, begin: int, end: int, sequences: int) -> Tensor:
    """Queries begin..end of a mask [b or 1, 1, sq, sk], one for each of b * groups: [b * groups or 1, 1, rows, sk]."""
    rows = mask[:, :, begin:end]
    return rows if len(rows) == 1 else rows.repeat_interleave(sequences // len(rows), dim=0)


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("attention: megatron-core's own module, since there is %s; its memory is quadratic", reason)
