"""Matrix products on CPUs by the library that `product_choice` names, for every model that runs in this process.

`use` puts kernels of its own behind aten's `mm`, `addmm`, their `out` forms and `addmm_` for CPU tensors. Linear
layers, matmul and all of their gradients end there. What is small, oddly strided or of another dtype goes to torch
itself. Nothing happens at import.
"""

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.cpu_compat import presence
from nemo_minitron.cpu_compat.product_choice import Choice

# Below these a kernel in Python costs more than it saves: multiplications of a product, and its smallest dimension.
_FEWEST = {torch.float32: 2**22, torch.bfloat16: 2**19}
_NARROWEST = 16
# Elements of an operand that are widened to float32 at once: 16 MiB.
_WIDENED = 2**22
_NAMES = ("mm", "mm.out", "addmm", "addmm.out", "addmm_")
logger = logging.getLogger("nemo_minitron")

_library: torch.library.Library | None = None
_active = Choice()
_own: dict[str, Any] = {}


def use(choice: Choice) -> bool:
    """From here on this process makes its products so; where CUDA is, nothing is changed.

    Returns:
        Whether any product leaves torch's own kernels.
    """
    global _library, _active
    _stop()
    if presence.cuda_was_present() or not _is_possible(choice):
        return False
    _active = choice
    _own.update({name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in _NAMES})
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, kernel in zip(_NAMES, (_mm, _mm_out, _addmm, _addmm_out, _addmm_in_place), strict=True):
            _library.impl(name, kernel, "CPU", with_keyset=True)
    logger.info("products on the CPU: %s (%s)", choice, choice.decided_by)
    return True


def _stop() -> None:
    """Leave all products to torch again."""
    global _library, _active
    if _library is not None:
        _library._destroy()
    _library, _active = None, Choice()


def _is_possible(choice: Choice) -> bool:
    """Whether the choice differs from torch's own, and this torch can make it."""
    if choice.float32 == "onednn" and not has_onednn():
        logger.warning("this torch has no product by oneDNN; products stay with its own BLAS")
        return False
    return choice.float32 != "torch" or choice.bfloat16 != "torch"


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN's full-precision product, which is behind torch.compile's linear layers and has no
    public name."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [n, k].T by oneDNN, float32, without autograd."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


# ---- the kernels: arguments as aten's, after the set of dispatch keys -----------------------------------------


def _mm(keys: Any, a: Tensor, b: Tensor) -> Tensor:
    if _is_ours(a, b):
        return _product(a, b)
    return _own["mm"].call_boxed(keys, a, b)


def _mm_out(keys: Any, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    if _is_ours(a, b) and _takes(out, a, b):
        return out.copy_(_product(a, b))
    return _own["mm.out"].call_boxed(keys, a, b, out=out)


def _addmm(keys: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if _is_ours(a, b) and _is_added(bias, a, b):
        return _product(a, b, bias, beta, alpha)
    return _own["addmm"].call_boxed(keys, bias, a, b, beta=beta, alpha=alpha)


def _addmm_out(
    keys: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Tensor
) -> Tensor:
    if _is_ours(a, b) and _is_added(bias, a, b) and _takes(out, a, b):
        return out.copy_(_product(a, b, bias, beta, alpha))
    return _own["addmm.out"].call_boxed(keys, bias, a, b, beta=beta, alpha=alpha, out=out)


def _addmm_in_place(
    keys: Any, total: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    if _is_ours(a, b) and _takes(total, a, b):
        return total.copy_(_product(a, b, total, beta, alpha))
    return _own["addmm_"].call_boxed(keys, total, a, b, beta=beta, alpha=alpha)


# ---- what they decide ------------------------------------------------------------------------------------------


def _is_ours(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b leaves torch's kernel; false for all that torch refuses, so that its messages stay."""
    dtype = a.dtype
    if dtype is torch.float32:
        if _active.float32 != "onednn":
            return False
    elif dtype is not torch.bfloat16 or _active.bfloat16 != "float32":
        return False
    if b.dtype is not dtype or a.dim() != 2 or b.dim() != 2:
        return False
    (m, k), (rows, n) = a.shape, b.shape
    return (
        k == rows
        and m * n * k >= _FEWEST[dtype]
        and min(m, n, k) >= _NARROWEST
        and _is_dense(a)
        and _is_dense(b)
    )


def _is_dense(matrix: Tensor) -> bool:
    """Whether rows or columns lie one after the other in memory, without overlap."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return (right == 1 and down >= columns) or (down == 1 and right >= rows)


def _is_added(bias: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `bias` broadcasts to a @ b; all that it may be else torch refuses."""
    if bias.dtype is not a.dtype or bias.dim() > 2:
        return False
    sizes = (a.size(0), b.size(1))[2 - bias.dim() :]
    return all(size in (1, full) for size, full in zip(bias.shape, sizes, strict=True))


def _takes(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the result needs no resizing of `out`."""
    return out.dtype is a.dtype and out.device.type == "cpu" and out.shape == (a.size(0), b.size(1))


# ---- what they do ----------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """beta * bias + alpha * a @ b [m, n], new, in a's dtype; sums are float32. With beta 0 `bias` is not read."""
    if a.dtype is torch.float32:
        return _add(linear(a, b.t()), bias, beta, alpha)
    wanted = None if bias is None or beta == 0 else bias.expand(a.size(0), b.size(1))
    out, tall = a.new_empty(a.size(0), b.size(1)), a.size(0) >= b.size(1)
    whole, step = (b if tall else a).float(), max(256, _WIDENED // a.size(1))
    for begin in range(
        0, max(out.shape), step
    ):  # of the larger operand a block at a time, so that little is widened
        part = slice(begin, begin + step)
        place = (part, slice(None)) if tall else (slice(None), part)
        wide = torch.mm(a[part].float(), whole) if tall else torch.mm(whole, b[:, part].float())
        out[place] = _add(wide, None if wanted is None else wanted[place], beta, alpha)
    return out


def _add(product: Tensor, bias: Tensor | None, beta: Any, alpha: Any) -> Tensor:
    """beta * bias + alpha * product, in product's memory."""
    if alpha != 1:
        product.mul_(alpha)
    return product if bias is None or beta == 0 else product.add_(bias, alpha=beta)
