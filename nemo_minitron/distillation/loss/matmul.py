"""The four matrix products of a chunk of tokens, with float32 results and sums whatever the inputs' dtype.

Shapes: n tokens, v the rank's columns, h one side's hidden size. CUDA has products of 16-bit inputs with a float32
result. On a CPU the head is walked in blocks of rows that stay in its cache, widened to float32 if need be, and float32
goes to the library that is faster on the processor (`cpu_compat.product_choice`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_minitron.cpu_compat import product_choice, products

_ROWS = 2048


def is_wide(dtype: torch.dtype) -> bool:
    """Whether products of this dtype need no widening."""
    return dtype in (torch.float32, torch.float64)


def write_logits(out: Tensor, hidden: Tensor, head: Tensor) -> None:
    """out [n, v] = hidden [n, h] @ head [v, h].T."""
    if not head.is_cuda:
        hidden = hidden.to(out.dtype)
        for rows, block in _blocks(head, out.dtype):
            out[:, rows] = _times_transposed(hidden, block)
    elif is_wide(head.dtype):
        torch.mm(hidden, head.t(), out=out)
    else:
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)


def write_hidden_gradient(out: Tensor, gradient: Tensor, head: Tensor) -> None:
    """out [n, h] = gradient [n, v] @ head [v, h]; out and head of one dtype, narrow gradients given as such on CUDA."""
    if head.is_cuda:
        torch.mm(gradient, head, out=out)
        return
    total = out.zero_() if out.dtype == gradient.dtype else gradient.new_zeros(out.shape)
    for rows, block in _blocks(head, gradient.dtype):
        total.add_(_times_transposed(gradient[:, rows], block.t()))
    if total is not out:
        out.copy_(total)


def add_head_gradient(out: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """out [v, h] (+)= gradient [n, v].T @ hidden [n, h]; on the first call `out` may hold anything."""
    if not hidden.is_cuda:
        transposed = hidden.to(out.dtype).t().contiguous()
        for rows, block in _blocks(out, out.dtype):
            product = _times_transposed(gradient[:, rows].t(), transposed)
            block.copy_(product) if first else block.add_(product)
    elif is_wide(hidden.dtype):
        torch.mm(gradient.t(), hidden, out=out) if first else out.addmm_(gradient.t(), hidden)
    elif first:
        torch.mm(gradient.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, gradient.t(), hidden, out_dtype=out.dtype, out=out)


def gradient_operand(gradient: Tensor, spare: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [n, v] as the products want it: itself, or on CUDA for a 16-bit head a copy in `spare`'s memory.

    spare: float32, contiguous, at least as large, overwritten.
    """
    if is_wide(dtype) or not gradient.is_cuda:
        return gradient
    return spare.view(-1).view(dtype)[: gradient.numel()].view(gradient.shape).copy_(gradient)


def _blocks(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, len(head), _ROWS):
        rows = slice(begin, begin + _ROWS)
        yield rows, head[rows].to(dtype)


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [n, k].T, on a CPU, without autograd; float32 by the library that is faster on this processor."""
    if a.dtype == torch.float32 and product_choice.current().float32 == "onednn" and products.has_onednn():
        return products.linear(a, b)
    return a @ b.t()
