"""Fixtures of all tests."""

import os
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# CI tries the same examples each time; everywhere else new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def megatron() -> Iterator[None]:
    """Megatron in pytest's own process: gloo, one rank, every parallel size 1."""
    import torch
    import torch.distributed as dist

    from nemo_minitron import cpu_compat

    torch.set_num_threads(1)
    cpu_compat.prepare_megatron()
    from megatron.core import parallel_state, tensor_parallel

    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(f"{directory}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
