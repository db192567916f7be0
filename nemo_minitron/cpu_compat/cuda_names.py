"""Names of `torch.cuda` that mean the CPU (STACK: torch 2.13.0 without CUDA), and the `torch` that a module sees."""

import contextlib
import types
from typing import Any

import torch

CPU = torch.device("cpu")


def close_gaps() -> None:
    """Apply every gap of this file, in order."""
    current_device_is_the_cpu()
    moving_to_cuda_stays()
    waiting_and_memory_calls_do_nothing()
    random_state_is_the_cpus()
    streams_and_events_are_empty()
    typed_tensor_names_exist()


def current_device_is_the_cpu() -> None:
    """`torch.cuda.current_device()` raises without CUDA; megatron and NeMo pass it as `device=` in 200 places."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: 0


def moving_to_cuda_stays() -> None:
    """`Tensor.cuda()` and `Module.cuda()` raise; NeMo's `gpt_data_step` and `MegatronParallel` call them."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign,assignment]


def waiting_and_memory_calls_do_nothing() -> None:
    """Checkpoint savers, timers and memory reports call these unguarded (megatron dist_checkpointing, NeMo timers)."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)
    torch.cuda.memory_stats = lambda *args, **kwargs: {}  # type: ignore
    torch.cuda.nvtx.range_push = lambda *args, **kwargs: None  # type: ignore
    torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None  # type: ignore


def random_state_is_the_cpus() -> None:
    """Megatron keeps model-parallel random states with these; on the CPU there is one generator, the default one."""
    get = lambda device=None: torch.get_rng_state()  # noqa: E731
    put = lambda state, device=None: torch.set_rng_state(state)  # noqa: E731
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    seed = lambda value: torch.default_generator.manual_seed(int(value)) and None  # noqa: E731
    for place in (torch.cuda, torch.cuda.random):
        place.get_rng_state = get  # type: ignore
        place.set_rng_state = put  # type: ignore
        place.manual_seed = seed  # type: ignore
        place.manual_seed_all = seed  # type: ignore


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def streams_and_events_are_empty() -> None:
    """Megatron's DDP, data prefetch and asynchronous savers order work on streams; the CPU works in order anyway."""
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *args, **kwargs: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda *args, **kwargs: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore


def typed_tensor_names_exist() -> None:
    """`torch.cuda.FloatTensor([..])` makes a CUDA tensor; NeMo and Aligner use the names as constructors."""
    names = ("FloatTensor", "LongTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "ByteTensor")
    for name in names:
        setattr(torch.cuda, name, getattr(torch, name))


class CpuTorch(types.ModuleType):
    """`torch` as one module sees it: the same, but that a "cuda" device means the CPU.

    A `TorchFunctionMode` would do this for every call of the process, and cost each of them; replacing `torch.zeros`
    itself breaks torch.jit. So only the modules that write `device="cuda"` get this view.
    """

    _FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "arange")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self._FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "cuda" in str(kwargs.get("device", "")):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return make


def show_cpu_torch_to(*modules: types.ModuleType) -> None:
    """Give each module the `CpuTorch` view under its global name `torch`."""
    view = CpuTorch()
    for module in modules:
        module.torch = view  # type: ignore[attr-defined]
