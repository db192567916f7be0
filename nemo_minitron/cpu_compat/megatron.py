"""Gaps of megatron-core 0.13.1 and 0.16.1 without CUDA; line numbers are of 0.13.1."""

import functools
import importlib
import importlib.util
from typing import Any

import torch

from nemo_minitron.cpu_compat.cuda_names import show_cpu_torch_to


def close_gaps() -> None:
    """Apply every gap of this file, in order."""
    factories_written_for_cuda()
    random_states_of_the_cpu()
    clipping_asserts_cuda_gradients()
    optimizers_know_types_by_their_cuda_names()
    adam_walks_memory_many_times()
    stages_share_logits_of_cuda_only()


def factories_written_for_cuda() -> None:
    """These modules write `device="cuda"` in factory calls: the pipeline schedules (`schedules.py:497`), the optimizer
    and its clipping, broadcast of the batch, parameter norms, checkpoint exchange, in 0.13 the two-stage saver."""
    names = (
        "pipeline_parallel.schedules",
        "optimizer.optimizer",
        "optimizer.grad_scaler",
        "optimizer.clip_grads",
        "tensor_parallel.data",
        "transformer.utils",
        "utils",
        "rerun_state_machine",
        "dist_checkpointing.exchange_utils",
        "dist_checkpointing.strategies.state_dict_saver",
    )
    show_cpu_torch_to(*(importlib.import_module(f"megatron.core.{name}") for name in names))
    two_stage = "megatron.core.dist_checkpointing.strategies.two_stage"
    if importlib.util.find_spec(two_stage):
        show_cpu_torch_to(importlib.import_module(two_stage))


def random_states_of_the_cpu() -> None:
    """`tensor_parallel.random` reads and writes CUDA generators; here the CPU's, so dropout under tensor parallelism
    keeps a stream for each rank. Its warning that the CPU's state changed inside a fork would then always fire."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random.logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def clipping_asserts_cuda_gradients() -> None:
    """`clip_grad_by_total_norm_fp32` asserts the type string 'torch.cuda.FloatTensor' of every gradient; the optimizer
    holds the function by name too. Torch's own clipping with a given norm does the same."""
    from megatron.core.optimizer import clip_grads, optimizer

    def clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
        assert not use_decoupled_grad, "decoupled gradients belong to Transformer Engine's optimizers"
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, torch.tensor(float(total_norm)))

    clip_grads.clip_grad_by_total_norm_fp32 = clip
    optimizer.clip_grad_by_total_norm_fp32 = clip


def optimizers_know_types_by_their_cuda_names() -> None:
    """The mixed-precision and the distributed optimizer tell parameters apart by type strings such as
    'torch.cuda.BFloat16Tensor', and raise on any other (`optimizer.py:616`, `distrib_optimizer.py:335`)."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for made in (optimizer.Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        if not hasattr(made.__init__, "__wrapped__"):
            made.__init__ = _with_cuda_type_names(made.__init__)


def adam_walks_memory_many_times() -> None:
    """Without Apex Megatron takes torch's AdamW as it comes, which on a CPU walks parameters, gradients and states in
    ten passes: 0.52 s for 71M parameters, and 0.10 s with `fused`. Its class stays AdamW, as Megatron asks for."""
    from megatron.core import optimizer

    optimizer.Adam = FusedAdamW


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW in one pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"fused": True, **options})


def _with_cuda_type_names(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        inherited = torch.Tensor.type

        def named(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
            answer = inherited(tensor, *rest, **options)
            return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

        torch.Tensor.type = named  # type: ignore
        try:
            return function(*args, **kwargs)
        finally:
            del torch.Tensor.type

    return wrapped


def stages_share_logits_of_cuda_only() -> None:
    """Text generation over pipeline stages asserts that what the last one broadcasts is a CUDA tensor
    (`inference/communication_utils.py`, `_is_cuda`)."""
    from megatron.core.inference import communication_utils

    communication_utils._is_cuda = lambda tensor: None
