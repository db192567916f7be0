"""Seconds of a training step under a layout, and all layouts that a machine has room for, best first."""

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.planning.machines import GIB, Cluster
from nemo_minitron.planning.memory import Layout, Memory, Training, parameters_on_rank, training_memory

_MICRO_BATCHES = (1, 2, 4, 8, 16)
# Bytes of an activation in a collective, by precision; gradients go in float32.
_ACTIVATION = {"32": 4, "bf16-mixed": 2}
_GRADIENT = 4
# A backward pass takes twice the products of a forward pass.
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Option:
    """A layout that fits, what a rank needs under it, and seconds of a step."""

    layout: Layout
    memory: Memory
    step_s: float


def step_flops(t: Training, *, recompute: bool = False) -> float:
    """FLOPs of a step over all ranks: three forward passes' worth of the student, one of the teacher.

    Args:
        recompute: whether layers are run once more in the backward pass.
    """
    times = FORWARD_AND_BACKWARD + (1 if recompute else 0) + (1 if t.reference else 0)
    a_token = times * t.student.flops_per_token(t.length)
    if t.teacher is not None:
        a_token += t.teacher.flops_per_token(t.length)
    return float(a_token * t.batch * t.sequences * t.length)


def step_seconds(t: Training, layout: Layout, cluster: Cluster) -> float:
    """A step's products at the assumed share of the peak, stretched by the pipeline's bubble, and then what ranks send
    each other: sums inside layers over a node's links, gradients over the network. None of it is overlapped.
    """
    rate = cluster.device.peak[t.precision] * cluster.efficiency * layout.ranks
    products = step_flops(t, recompute=layout.recompute == "full") / rate
    bubble = 1 + (layout.pp - 1) / t.micro_batches(layout)
    return products * bubble + _inside_layers(t, layout, cluster) + _gradients(t, layout, cluster)


def _inside_layers(t: Training, layout: Layout, cluster: Cluster) -> float:
    """Two sums of [s, b, h] over the tensor-parallel ranks in each layer and direction."""
    if layout.tp == 1:
        return 0.0
    times = 2 * (3 if layout.recompute == "full" else 2)
    values = times * t.student.num_layers * t.student.hidden_size
    if t.teacher is not None:
        values += 2 * t.teacher.num_layers * t.teacher.hidden_size
    tokens = t.batch * t.sequences * t.length / layout.dp
    sent = values / layout.pp * tokens * _ACTIVATION[t.precision] * 2 * (layout.tp - 1) / layout.tp
    return sent / cluster.device.link


def _gradients(t: Training, layout: Layout, cluster: Cluster) -> float:
    """One sum of all gradients over the data-parallel ranks."""
    if layout.dp == 1:
        return 0.0
    own = max(parameters_on_rank(t.student, layout, stage) for stage in range(layout.pp))
    speed = cluster.device.link if layout.ranks <= cluster.per_node else cluster.network
    return own * _GRADIENT * 2 * (layout.dp - 1) / layout.dp / speed


def options(t: Training, cluster: Cluster) -> list[Option]:
    """The layouts of all devices under which no rank needs more than a device has, the fastest first.

    Raises:
        InputError: there is none; says how much the least of them would need.
    """
    found = [_option(t, layout, cluster) for layout in layouts(t, cluster)]
    if not found:
        raise InputError(
            f"{cluster.devices} devices cannot share {t.batch} sequences a step and {t.student.num_layers} layers; "
            "choose another number of nodes or devices"
        )
    room = [each for each in found if each.memory.total <= cluster.device.memory]
    if not room:
        least = min(found, key=lambda each: each.memory.total)
        raise InputError(_nothing_fits(least, cluster))
    return sorted(room, key=lambda each: (each.step_s, each.memory.total))


def _option(t: Training, layout: Layout, cluster: Cluster) -> Option:
    return Option(layout, training_memory(t, layout), step_seconds(t, layout, cluster))


def _nothing_fits(least: Option, cluster: Cluster) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in least.layout.settings().items() if value)
    return (
        f"nothing fits: needs at least {least.memory.total / GIB:.1f} GiB on each of {cluster.devices} devices "
        f"({settings}), and {cluster.device.name} has {cluster.device.memory / GIB:.1f}"
    )


def layouts(t: Training, cluster: Cluster) -> Iterator[Layout]:
    """Those of all devices that models, batch and sequence can be shared under; tensor parallelism within a node."""
    models = [t.student, *([t.teacher] if t.teacher else [])]
    for tp in _divisors(cluster.per_node):
        if not all(_shared_by(a, tp) for a in models):
            continue
        for pp in _divisors(cluster.devices // tp):
            dp = cluster.devices // (tp * pp)
            if any(a.num_layers % pp for a in models) or t.batch % dp:
                continue
            yield from _variants(t, tp, pp, dp)


def _variants(t: Training, tp: int, pp: int, dp: int) -> Iterator[Layout]:
    for micro in _MICRO_BATCHES:
        if t.batch % (micro * dp):
            continue
        for recompute in (None, "full"):
            # Sharing the sequence costs nothing: the same bytes are sent, and less is kept.
            yield Layout(tp, pp, dp, tp > 1 and t.length % tp == 0, recompute, micro)


def _shared_by(a: Architecture, tp: int) -> bool:
    return a.num_query_groups % tp == 0 and a.ffn_hidden_size % tp == 0


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
