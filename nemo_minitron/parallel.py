"""The core's only collectives: thin functions over Megatron's parallel groups.

A group is named "tp" (tensor), "pp" (pipeline), "dp" (data, context parallelism left out) or "cp" (context).
Where nothing is initialised, or a group has one rank, sizes are 1, ranks are 0 and every call returns without
communication. Tensors stay on their device: the same calls run on NCCL and on gloo.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

GroupName = Literal["tp", "pp", "dp", "cp"]
ReduceOp = Literal["sum", "max", "min"]

_GETTERS = {
    "tp": "get_tensor_model_parallel_group",
    "pp": "get_pipeline_model_parallel_group",
    "dp": "get_data_parallel_group",
    "cp": "get_context_parallel_group",
}
# Groups whose ranks work each by itself for now.
_apart: set[str] = set()


@contextmanager
def apart(name: GroupName) -> Iterator[None]:
    """Within it the ranks of the group are each alone: its size is 1, and nothing is sent."""
    _apart.add(name)
    try:
        yield
    finally:
        _apart.discard(name)


def process_group(name: GroupName) -> dist.ProcessGroup | None:
    """The calling rank's group, None where Megatron's parallel state is not initialised, and within `apart`."""
    if name in _apart:
        return None
    # Whoever initialised the parallel state has imported the module; importing it here would cost seconds.
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not dist.is_initialized() or not state.model_parallel_is_initialized():
        return None
    return getattr(state, _GETTERS[name])()


def group_size(name: GroupName) -> int:
    """Ranks in the group, 1 where nothing is initialised."""
    group = process_group(name)
    return 1 if group is None else group.size()


def group_rank(name: GroupName) -> int:
    """The caller's rank in the group, 0 where nothing is initialised."""
    group = process_group(name)
    return 0 if group is None else group.rank()


def tp_size() -> int:
    """Tensor-parallel size."""
    return group_size("tp")


def tp_rank() -> int:
    """Tensor-parallel rank."""
    return group_rank("tp")


def pp_size() -> int:
    """Pipeline-parallel size (stages)."""
    return group_size("pp")


def pp_rank() -> int:
    """Pipeline-parallel rank (stage)."""
    return group_rank("pp")


def dp_size() -> int:
    """Data-parallel size, context parallelism left out."""
    return group_size("dp")


def dp_rank() -> int:
    """Data-parallel rank, context parallelism left out."""
    return group_rank("dp")


def cp_size() -> int:
    """Context-parallel size."""
    return group_size("cp")


def cp_rank() -> int:
    """Context-parallel rank."""
    return group_rank("cp")


def all_reduce(t: Tensor, group: GroupName, op: ReduceOp = "sum") -> Tensor:
    """Reduce t [any shape, alike on every rank of the group] in place; returns t for convenience."""
    if group_size(group) > 1:
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(t, op=ops[op], group=process_group(group))
    return t


def all_gather(t: Tensor, group: GroupName) -> list[Tensor]:
    """Each rank's t, by rank in the group. All ranks give the same shape and dtype."""
    if group_size(group) == 1:
        return [t]
    t = t.contiguous()
    gathered = [torch.empty_like(t) for _ in range(group_size(group))]
    dist.all_gather(gathered, t, group=process_group(group))
    return gathered


def all_gather_tp(t: Tensor) -> list[Tensor]:
    """`all_gather` over the tensor-parallel ranks."""
    return all_gather(t, "tp")


def gather_sequence(t: Tensor) -> Tensor:
    """The whole [s, ...] out of each tensor-parallel rank's [s/tp, ...], as sequence parallelism cuts it."""
    if tp_size() == 1:
        return t
    t = t.contiguous()
    whole = t.new_empty(t.shape[0] * tp_size(), *t.shape[1:])
    dist.all_gather_into_tensor(whole, t, group=process_group("tp"))
    return whole


def reduce_scatter_sequence(t: Tensor) -> Tensor:
    """The rank's [s/tp, ...] of the tensor-parallel ranks' sum of t [s, ...]; s is a multiple of tp."""
    if tp_size() == 1:
        return t
    assert t.shape[0] % tp_size() == 0, f"{t.shape[0]} tokens over {tp_size()} ranks"
    part = t.new_empty(t.shape[0] // tp_size(), *t.shape[1:])
    dist.reduce_scatter_tensor(part, t.contiguous(), group=process_group("tp"))
    return part


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        # Megatron-core 0.13.1's mapping leaves a tensor that is not contiguous as it was.
        return all_reduce(t.clone(memory_format=torch.contiguous_format), "tp")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), "tp")


def sum_tp(t: Tensor) -> Tensor:
    """The tensor-parallel ranks' sum of t, not in place; the gradient passes as it is, which is right where every
    rank does the same with the sum."""
    return t if tp_size() == 1 else _Sum.apply(t)


def copy_tp(t: Tensor) -> Tensor:
    """t, the same on all tensor-parallel ranks, where each goes on with it differently: gradients are summed."""
    return t if tp_size() == 1 else _Copy.apply(t)


def barrier() -> None:
    """Wait for all ranks; one process goes on at once."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def true_everywhere(t: Tensor) -> bool:
    """Whether t [], bool, is true on every rank there is; all of them ask."""
    everywhere = t.int()
    if dist.is_initialized():
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)


def gather_objects(value: Any, group: GroupName) -> list[Any]:
    """Each rank's value, any picklable object, by rank in the group, on every rank. For small things."""
    if group_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * group_size(group)
    dist.all_gather_object(gathered, value, group=process_group(group))
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, any picklable object, on every rank there is; all of them call, what others give is passed over.
    For small things."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    carried = [value]
    dist.broadcast_object_list(carried, src=0)
    return carried[0]


def gather_over_pp(value: Any) -> list[Any]:
    """`gather_objects` over the pipeline's stages."""
    return gather_objects(value, "pp")


def exchange_tp(send: list[Tensor]) -> list[Tensor]:
    """All-to-all over the tensor-parallel ranks: `send[r]` goes to rank r, `result[r]` came from rank r.

    Args:
        send: one tensor for each rank; they (and those of the other ranks) may differ in dimension 0 only,
            where 0 rows are legal.

    Returns:
        Tensors of the same dtype and trailing shape; the caller's own entry holds what it sent to itself.
    """
    ranks = tp_size()
    assert len(send) == ranks, f"{len(send)} tensors for {ranks} ranks"
    if ranks == 1:
        return list(send)
    rows = torch.tensor([t.shape[0] for t in send], dtype=torch.int64, device=send[0].device)
    incoming = torch.empty_like(rows)
    dist.all_to_all_single(incoming, rows, group=process_group("tp"))
    sizes = [int(n) for n in incoming]
    packed = torch.cat(send).contiguous()
    received = packed.new_empty(sum(sizes), *packed.shape[1:])
    splits = [t.shape[0] for t in send]
    dist.all_to_all_single(received, packed, sizes, splits, group=process_group("tp"))
    return list(received.split(sizes))


def broadcast_pp(t: Tensor, stage: int) -> Tensor:
    """Overwrite t [any shape] on every stage with that of `stage`; returns t for convenience."""
    group = process_group("pp")
    if group is not None and group.size() > 1:
        dist.broadcast(t, src=dist.get_global_rank(group, stage), group=group)
    return t


def exchange_pp(send: list[tuple[int, Tensor]], receive: list[tuple[int, Tensor]]) -> None:
    """Point-to-point moves between pipeline stages, all in one batch; returns when the buffers are filled.

    Args:
        send: (destination stage, contiguous tensor).
        receive: (source stage, contiguous buffer to fill). Between two stages, the n-th send matches the n-th
            receive. The caller's own stage may appear in neither.
    """
    if not send and not receive:
        return
    group = process_group("pp")
    assert group is not None, "moves between stages need an initialised pipeline group"
    stages = [stage for stage, _ in send + receive]
    assert pp_rank() not in stages, "a stage neither sends to nor receives from itself"
    ops = [dist.P2POp(dist.isend, t, dist.get_global_rank(group, stage), group) for stage, t in send]
    ops += [dist.P2POp(dist.irecv, t, dist.get_global_rank(group, stage), group) for stage, t in receive]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


class PipelineRelay:
    """Tensors handed from each pipeline stage to the next beside Megatron's schedule.

    It has a process group of its own: on the schedule's group, what is sent here could match a receive of the
    schedule. Made by all ranks of the world together, as any process group; the n-th `receive` matches the
    n-th `send`.
    """

    def __init__(self) -> None:
        group = process_group("pp")
        self._pending: tuple[Any, Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        if group is not None and group.size() > 1:
            # Not use_local_synchronization: torch 2.13 then names the group by how many groups the rank is
            # in, which differs between stages (Megatron's embedding groups), and each waits for another
            # name.
            lines: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(lines, tuple(dist.get_process_group_ranks(group)))
            self._group = dist.new_subgroups_by_enumeration([list(line) for line in sorted(set(lines))])[0]

    def send(self, t: Tensor) -> None:
        """Start to send t [any shape] to the next stage; waits until what was sent before has been
        received."""
        assert self._group is not None
        self.wait()
        t = t.contiguous()
        work = dist.isend(t, dist.get_global_rank(self._group, pp_rank() + 1), self._group)
        self._pending = (work, t)

    def receive(self, buffer: Tensor) -> Tensor:
        """Fill the contiguous buffer with what the stage before sends; returns it for convenience."""
        assert self._group is not None
        dist.recv(buffer, dist.get_global_rank(self._group, pp_rank() - 1), self._group)
        return buffer

    def wait(self) -> None:
        """Wait until the next stage has what was sent."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def close(self) -> None:
        """Wait, and give the process group back."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
