"""The proof of the optimizer's gap in nemo_minitron/cpu_compat/megatron.py; tests.support.host_gaps runs it."""

from collections.abc import Callable
from typing import Any

import torch

from tests.support.host_gaps import close, shows, weights_with_gradients


@shows("megatron")
def adam_walks_memory_many_times(gap: Callable[[], None]) -> None:
    """Three steps beside Adam's definition (arXiv 1711.05101, algorithm 2) in float64, and after a resume."""
    from megatron.core import optimizer

    plain = optimizer.Adam(weights_with_gradients())
    assert not plain.param_groups[0]["fused"], "it is one pass without the stand-in"
    gap()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(40, 3, generator=generator)
    gradients = torch.randn(4, 40, 3, generator=generator)
    expected, m, v = start.double(), torch.zeros(40, 3).double(), torch.zeros(40, 3).double()
    weight = torch.nn.Parameter(start.clone())
    options: Any = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam = optimizer.Adam([weight], **options)
    assert isinstance(adam, torch.optim.AdamW)
    for step, gradient in enumerate(gradients.double(), 1):
        if step == 3:
            saved, adam = adam.state_dict(), optimizer.Adam([weight], **options)
            adam.load_state_dict(saved)
        weight.grad = gradient.float()
        adam.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
        close(weight.detach(), expected, 1e-5)
    assert adam.param_groups[0]["fused"]
