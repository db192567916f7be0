"""Every stand-in of nemo_minitron.cpu_compat, one by one, in the order in which they are applied.

    python -c "from tests.support import host_gaps; host_gaps.main()" > answers.json

Each function below first shows that what it is named after breaks, then closes that one gap, then holds what works now
against an independent reference. In a process of its own, since the stand-ins stay for a process's life.
"""

import contextlib
import ctypes
import importlib
import json
import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PROOFS: dict[str, Callable[[Callable[[], None]], None]] = {}


def shows(file: str) -> Callable[[Any], Any]:
    """Registers the proof of the gap of the same name in nemo_minitron/cpu_compat/FILE.py."""

    def register(proof: Any) -> Any:
        PROOFS[f"{file}.{proof.__name__}"] = proof
        return proof

    return register


def breaks(action: Callable[[], Any], *errors: type[BaseException]) -> None:
    expected = errors or (RuntimeError, AssertionError)
    try:
        action()
    except expected:
        return
    raise AssertionError("it works without the stand-in")


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


# ---- torch.cuda --------------------------------------------------------------------------------------------


@shows("cuda_names")
def current_device_is_the_cpu(gap: Callable[[], None]) -> None:
    breaks(torch.cuda.current_device)
    gap()
    torch.cuda.set_device(0)
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.cuda.device_count() == 0


@shows("cuda_names")
def moving_to_cuda_stays(gap: Callable[[], None]) -> None:
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    breaks(tensor.cuda)
    breaks(module.cuda)
    gap()
    assert tensor.cuda(non_blocking=True) is tensor
    assert module.cuda() is module


@shows("cuda_names")
def waiting_and_memory_calls_do_nothing(gap: Callable[[], None]) -> None:
    breaks(torch.cuda.synchronize)
    breaks(torch.cuda.reset_peak_memory_stats, AttributeError, RuntimeError)
    gap()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_reserved() == 0
    assert torch.cuda.memory_stats() == {}


@shows("cuda_names")
def random_state_is_the_cpus(gap: Callable[[], None]) -> None:
    breaks(torch.cuda.get_rng_state, RuntimeError, AssertionError, IndexError)
    gap()
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(3), expected)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), expected)


@shows("cuda_names")
def streams_and_events_are_empty(gap: Callable[[], None]) -> None:
    breaks(lambda: torch.cuda.Stream().synchronize())
    breaks(torch.cuda.current_stream)
    gap()
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
    event.synchronize()


@shows("cuda_names")
def typed_tensor_names_exist(gap: Callable[[], None]) -> None:
    breaks(lambda: torch.cuda.FloatTensor([1.0]), TypeError, RuntimeError)
    gap()
    for name, dtype in (
        ("FloatTensor", torch.float32),
        ("LongTensor", torch.int64),
        ("ByteTensor", torch.uint8),
    ):
        made = getattr(torch.cuda, name)([1, 2])
        assert (made.dtype, made.device.type, made.tolist()) == (dtype, "cpu", [1, 2])


# ---- megatron-core -----------------------------------------------------------------------------------------


def one_rank() -> None:
    """Megatron's groups, gloo, every size 1."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    store = dist.FileStore(f"{tempfile.mkdtemp()}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def weights_with_gradients() -> list[torch.nn.Parameter]:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, 2))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 12.0]])
    return weights


@shows("megatron")
def factories_written_for_cuda(gap: Callable[[], None]) -> None:
    one_rank()
    from megatron.core import parallel_state
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import data

    group = parallel_state.get_model_parallel_group()
    gradients = [weight.grad for weight in weights_with_gradients()]
    breaks(lambda: clip_grads.get_grad_norm_fp32(gradients, grad_stats_parallel_group=group))
    batch = {"tokens": torch.arange(6).view(2, 3)}
    breaks(lambda: data.broadcast_data(["tokens"], batch, torch.int64))
    gap()
    assert clip_grads.get_grad_norm_fp32(gradients, grad_stats_parallel_group=group) == 13.0
    assert clip_grads.count_zeros_fp32(weights_with_gradients(), grad_stats_parallel_group=group) == 3
    assert torch.equal(data.broadcast_data(["tokens"], batch, torch.int64)["tokens"], batch["tokens"])
    # Only those modules' own view of torch is another.
    assert clip_grads.torch is not torch
    assert clip_grads.torch.nn is torch.nn
    breaks(lambda: torch.zeros(1, device="cuda"))


@shows("megatron")
def random_states_of_the_cpu(gap: Callable[[], None]) -> None:
    from megatron.core.tensor_parallel import random

    breaks(lambda: random._get_cuda_rng_state(graph_safe=True))
    state, drawn = torch.get_rng_state(), torch.rand(4)
    random._set_cuda_rng_state(state)
    assert not torch.equal(torch.rand(4), drawn), "it is set without the stand-in"
    gap()
    random.model_parallel_cuda_manual_seed(5)
    torch.manual_seed(1)
    plain = torch.rand(4)
    torch.manual_seed(1)
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[assignment]
    logging.getLogger(random.__name__).addHandler(handler)
    with random.get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    with random.get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    # The fork has a stream of its own, and the default one does not notice.
    assert torch.equal(torch.rand(4), plain)
    both = torch.rand(8, generator=torch.Generator().manual_seed(5 + 2718))
    assert torch.equal(torch.cat([first, second]), both)
    assert not heard


@shows("megatron")
def clipping_asserts_cuda_gradients(gap: Callable[[], None]) -> None:
    from megatron.core.optimizer import clip_grads, optimizer

    breaks(lambda: clip_grads.clip_grad_by_total_norm_fp32(weights_with_gradients(), 1.0, 13.0))
    gap()
    for module in (clip_grads, optimizer):
        for limit, factor in ((1.3, 0.1), (20.0, 1.0)):
            weights = weights_with_gradients()
            module.clip_grad_by_total_norm_fp32(weights, limit, 13.0)
            for clipped, before in zip(weights, weights_with_gradients(), strict=True):
                close(clipped.grad, before.grad.double() * factor)


@shows("megatron")
def optimizers_know_types_by_their_cuda_names(gap: Callable[[], None]) -> None:
    """Weights in bfloat16 step as their copies in float32 do under torch's own Adam."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, bf16=True)
    start, gradient = torch.arange(16.0).view(4, 4) / 8, torch.arange(16.0, 0.0, -1.0).view(4, 4)

    def stepped(distributed: bool) -> Tensor:
        linear = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(start)
        buffers = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
        )
        model = DistributedDataParallel(config, buffers, linear)
        options = OptimizerConfig(
            optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.0, bf16=True,
            params_dtype=torch.bfloat16, use_distributed_optimizer=distributed,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(options, [model])
        for _ in range(3):
            linear.weight.main_grad.copy_(gradient)
            optimizer.step()
        return linear.weight.detach()

    for distributed in (False, True):
        breaks(lambda: stepped(distributed), TypeError)  # noqa: B023
    gap()
    theirs = torch.nn.Parameter(start.clone())
    theirs.grad = gradient
    adam = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(3):
        adam.step()
    for distributed in (False, True):
        assert torch.equal(stepped(distributed), theirs.detach().bfloat16())
    assert torch.zeros(1).type() == "torch.FloatTensor"


@shows("megatron")
def stages_share_logits_of_cuda_only(gap: Callable[[], None]) -> None:
    from megatron.core.inference.communication_utils import broadcast_from_last_pipeline_stage

    logits = torch.rand(2, 1, 3)
    breaks(lambda: broadcast_from_last_pipeline_stage([2, 1, 3], torch.float32, logits))
    gap()
    assert broadcast_from_last_pipeline_stage([2, 1, 3], torch.float32, logits) is logits
    breaks(lambda: broadcast_from_last_pipeline_stage([2, 1, 4], torch.float32, logits))


# ---- NeMo 2 ------------------------------------------------------------------------------------------------


@shows("nemo2")
def container_version_is_asked_for(gap: Callable[[], None]) -> None:
    os.environ.pop("NVIDIA_PYTORCH_VERSION", None)
    from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel

    breaks(lambda: MegatronBaseModel._enable_nvidia_optimizations(SimpleNamespace()), TypeError)
    gap()
    MegatronBaseModel._enable_nvidia_optimizations(SimpleNamespace())


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2 (2.33 and later); `hblks` counts the blocks that mmap gave."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*_names, "keepcost")]


def mapped_blocks() -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    return libc.mallinfo2().hblks


@shows("nemo2")
def large_buffers_fault_on_every_step(gap: Callable[[], None]) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        gap()
        return
    before = mapped_blocks()
    mapped = torch.empty(64 << 20, dtype=torch.uint8)
    assert mapped_blocks() > before
    gap()
    before = mapped_blocks()
    kept = torch.empty(64 << 20, dtype=torch.uint8)
    assert mapped_blocks() == before
    assert len(mapped) == len(kept)


@shows("nemo2")
def missing_accelerators_are_announced_often(gap: Callable[[], None]) -> None:
    def shown() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            for message in ("Apex is not installed", "no transformer_engine", "CUDA is missing", "mind this"):
                warnings.warn(message, UserWarning, stacklevel=1)
        return [str(warning.message) for warning in caught]

    warnings.resetwarnings()
    warnings.simplefilter("always")
    assert len(shown()) == 4
    gap()
    assert shown() == ["mind this"]


def forked() -> Tensor:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        return torch.rand(4)


def seeds_model_parallel_states(module: Any, gap: Callable[[], None]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().reset()
    module._set_random_seed(5)
    breaks(forked, Exception)
    gap()
    module._set_random_seed(5)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(forked(), torch.rand(4, generator=torch.Generator().manual_seed(5 + 2718)))


@shows("nemo2")
def model_parallel_seeds_need_a_gpu(gap: Callable[[], None]) -> None:
    seeds_model_parallel_states(importlib.import_module("nemo.lightning.megatron_init"), gap)


@shows("nemo2")
def loaded_tensors_are_moved_to_cuda(gap: Callable[[], None]) -> None:
    pl = importlib.import_module("nemo.lightning.io.pl")
    checkpoint = {"weight": torch.ones(2), "nested": [{"step": torch.tensor(3)}]}
    breaks(lambda: pl._fix_tensors_device(checkpoint))
    gap()
    fixed = pl._fix_tensors_device(checkpoint)
    assert torch.equal(fixed["weight"], torch.ones(2))
    assert fixed["nested"][0]["step"] == 3


def main() -> None:
    """{"file.gap": null or a traceback}, the log lines of the three `prepare_*`, and what they returned."""
    from nemo_minitron import cpu_compat

    importlib.import_module("tests.support.host_gaps_optimizer")
    importlib.import_module("tests.support.host_gaps_local_spec")
    importlib.import_module("tests.support.host_gaps_aligner")
    answers: dict[str, Any] = {}
    for name, proof in PROOFS.items():
        file, gap = name.split(".")
        module = importlib.import_module(f"nemo_minitron.cpu_compat.{file}")
        called = []
        try:
            proof(lambda: called.append(getattr(module, gap)()))  # noqa: B023
            assert called, "the proof did not close the gap"
            answers[name] = None
        except BaseException:
            answers[name] = traceback.format_exc()
            with contextlib.suppress(Exception):
                getattr(module, gap)()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    cpu_compat.logger.addHandler(handler)
    cpu_compat.logger.setLevel(logging.INFO)
    prepare = (
        cpu_compat.prepare_megatron,
        cpu_compat.prepare_nemo,
        cpu_compat.prepare_aligner,
        cpu_compat.prepare_nemo,
    )
    returned = [step() for step in prepare]
    print(json.dumps({"gaps": answers, "lines": lines, "returned": returned}), flush=True)
