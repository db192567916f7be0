"""Gaps of NeMo 2 (nemo_toolkit 2.4.1) without CUDA."""

import ctypes
import os
import sys
import warnings


def close_gaps() -> None:
    """Apply every gap of this file, in order."""
    container_version_is_asked_for()
    large_buffers_fault_on_every_step()
    missing_accelerators_are_announced_often()
    model_parallel_seeds_need_a_gpu()
    loaded_tensors_are_moved_to_cuda()


def container_version_is_asked_for() -> None:
    """NeMo 1's `megatron_base_model` matches NVIDIA_PYTORCH_VERSION with a regular expression and fails on None."""
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "25.02")


def large_buffers_fault_on_every_step() -> None:
    """glibc maps each large activation anew and hands it back, so every training step pays the page faults again: half
    of the step's time on two cores (1.1 against 2.5 thousand tokens a second, 3.6M parameters). Keep the memory."""
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 64 << 20)


def missing_accelerators_are_announced_often() -> None:
    """Importing NeMo prints dozens of warnings on what is not installed; here that is known."""
    for message in (
        ".*[Aa]pex.*",
        ".*Transformer Engine.*",
        ".*transformer_engine.*",
        ".*pynvml.*",
        ".*CUDA.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def model_parallel_seeds_need_a_gpu() -> None:
    """`nemo.lightning.megatron_init._set_random_seed` adds Megatron's model-parallel random states only where it counts
    a GPU; without them `get_cuda_rng_tracker().fork()` raises in the first attention."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo.lightning import megatron_init

    seed_generators = megatron_init._set_random_seed

    def seed_all(seed: int) -> None:
        seed_generators(seed)
        model_parallel_cuda_manual_seed(seed + 100 * megatron_init.get_pipeline_model_parallel_rank())

    megatron_init._set_random_seed = seed_all


def loaded_tensors_are_moved_to_cuda() -> None:
    """`nemo.lightning.io.pl._fix_tensors_device` asserts that CUDA is initialised; there is no device to move to."""
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda checkpoint: checkpoint
