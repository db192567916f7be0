"""Machines as a plan counts them: memory, peak FLOP/s and links of a device, and how many of them there are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config.plan import HERE

GIB = 2**30
# The share of a device's memory that allocators and libraries take beside tensors; assumed.
RESERVE = 0.08


@dataclass(frozen=True)
class Device:
    """One GPU, or one process of this machine.

    Attributes:
        name: as `plan.gpu` has it.
        memory: bytes that a rank's tensors may take.
        peak: FLOP/s by `trainer.precision`, dense.
        link: bytes a second to another device of the same node, one way.
    """

    name: str
    memory: float
    peak: Mapping[str, float]
    link: float


# name: GiB that a process can take (a data sheet's number less what drivers keep), dense TFLOP/s in float32 without
# TF32 and in bfloat16, GB/s to a neighbour one way; the vendors' data sheets.
_GPUS = {
    "b200": (178, 75, 2250, 900),
    "h200": (139, 67, 989, 450),
    "h100": (79, 67, 989, 450),
    "a100": (79, 19.5, 312, 300),
    "a100_40gb": (39, 19.5, 312, 300),
    "l40s": (44, 91.6, 362, 32),
    "l4": (22, 30.3, 121, 32),
    "rtx4090": (23, 82.6, 165, 32),
    "rtx3090": (23, 35.6, 71, 32),
}


def gpu(name: str, memory_gib: float | None = None, tflops: float | None = None) -> Device:
    """A GPU by its name, with numbers of one's own where they are given.

    Args:
        name: one of `config.plan.GPUS`.
        memory_gib: of the device.
        tflops: its peak, in whatever precision is trained in.
    """
    memory, single, half, link = _GPUS[name]
    peak = {"32": single, "bf16-mixed": half} if tflops is None else {"32": tflops, "bf16-mixed": tflops}
    usable = (memory if memory_gib is None else memory_gib) * GIB * (1 - RESERVE)
    return Device(name, usable, {key: value * 1e12 for key, value in peak.items()}, link * 1e9)


def this_machine(memory_gib: float | None = None) -> Device:
    """One process here; how fast it is must be measured (`workflows.plan_run.calibration`)."""
    total = memory_gib * GIB if memory_gib is not None else _memory()
    return Device(HERE, total, {}, 0.0)


def _memory() -> float:
    """Bytes of this machine, or those of the group of processes that this one may share."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return float(min(whole, int(text)) if text.isdigit() else whole)


@dataclass(frozen=True)
class Cluster:
    """What a run may take.

    Attributes:
        device: each of them.
        nodes, per_node: how many.
        efficiency: the share of the peak that products reach; assumed for GPUs.
        network: bytes a second from a device to one of another node.
        price_per_hour: of one device, in whatever currency; None: not known.
    """

    device: Device
    nodes: int = 1
    per_node: int = 1
    efficiency: float = 0.4
    network: float = 50e9
    price_per_hour: float | None = None

    @property
    def devices(self) -> int:
        """In all."""
        return self.nodes * self.per_node
