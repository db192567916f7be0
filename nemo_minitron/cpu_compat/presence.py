"""Whether there is CUDA, asked once."""

import functools


@functools.cache
def cuda_was_present() -> bool:
    """Asked once, before any stand-in is in place."""
    import torch

    return torch.cuda.is_available()
