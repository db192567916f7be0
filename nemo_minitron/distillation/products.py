"""The four matrix products of a chunk of tokens, with float32 results and sums whatever the inputs' dtype.

Shapes: n tokens, v the rank's columns, h one side's hidden size. float32 (and float64) go straight to the library; for
16-bit inputs CUDA has products with a float32 result, elsewhere the head is widened a few rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS_WIDENED = 4096


def is_wide(dtype: torch.dtype) -> bool:
    """Whether products of this dtype need no widening."""
    return dtype in (torch.float32, torch.float64)


def write_logits(out: Tensor, hidden: Tensor, head: Tensor) -> None:
    """out [n, v] = hidden [n, h] @ head [v, h].T."""
    if is_wide(head.dtype):
        torch.mm(hidden, head.t(), out=out)
    elif head.is_cuda:
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for rows, block in _widened(head, out.dtype):
            torch.mm(hidden, block.t(), out=out[:, rows])


def write_hidden_gradient(out: Tensor, gradient: Tensor, head: Tensor) -> None:
    """out [n, h] = gradient [n, v] @ head [v, h]; out and head of one dtype, narrow gradients given as such on CUDA."""
    if is_wide(head.dtype) or head.is_cuda:
        torch.mm(gradient, head, out=out)
    else:
        total = gradient.new_zeros(out.shape)
        for rows, block in _widened(head, gradient.dtype):
            total.addmm_(gradient[:, rows], block)
        out.copy_(total)


def add_head_gradient(out: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """out [v, h] (+)= gradient [n, v].T @ hidden [n, h]; on the first call `out` may hold anything."""
    if hidden.is_cuda and not is_wide(hidden.dtype):
        if first:
            torch.mm(gradient.t(), hidden, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, gradient.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        if first:
            torch.mm(gradient.t(), hidden, out=out)
        else:
            out.addmm_(gradient.t(), hidden)


def gradient_operand(gradient: Tensor, spare: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [n, v] as the products want it: itself, or on CUDA for a 16-bit head a copy in `spare`'s memory.

    spare: float32, contiguous, at least as large, overwritten.
    """
    if is_wide(dtype) or not gradient.is_cuda:
        return gradient
    return spare.view(-1).view(dtype)[: gradient.numel()].view(gradient.shape).copy_(gradient)


def _widened(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, len(head), _ROWS_WIDENED):
        rows = slice(begin, begin + _ROWS_WIDENED)
        yield rows, head[rows].to(dtype)
