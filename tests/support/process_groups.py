"""Stand-ins for Megatron's process groups, by the keyword that the installed version takes them by."""

import inspect
from types import SimpleNamespace
from typing import Any


def of_tensor_ranks(module: Any, size: int) -> dict[str, Any]:
    """The keyword and value that tell one of megatron-core's modules the number of tensor-parallel ranks."""
    name = "pg_collection"  # from 0.16 on
    if name not in inspect.signature(module).parameters:
        name = "model_comm_pgs"
    return {name: SimpleNamespace(tp=SimpleNamespace(size=lambda: size))}
