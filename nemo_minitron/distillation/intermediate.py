"""Residual states of a student held against its teacher's at chosen layers (arXiv 2407.14679, section 3).

Each loss joins where the state is, on whatever pipeline stage, and its gradient is added to that of the output's loss
on the way back, as Megatron-core does with the auxiliary losses of experts. A layer's number is 0-based and global.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.errors import InputError
from nemo_minitron.importance.hook_points import norm_sites
from nemo_minitron.megatron_gpt import decoder_of, layers_of

EMBEDDING = "embedding"
Key = int | str
DISTANCES = ("cosine", "mse")
PLACES = ("output", "norm")
PROJECTIONS = ("shared", "each")


@dataclass(frozen=True)
class Intermediate:
    """Which states are compared, and how.

    Attributes:
        layers: teacher layer to student layer.
        embedding: whether what enters the first layer is compared too.
        at: "output", what a layer adds up to; "norm", the same after the norm that follows (the next layer's first, or
            the final one).
        distance: "cosine", 1 - cos; "mse", the mean over channels of the squared difference.
        alpha: weight of the distance; None: the last step's loss on the output over its distance, so that both weigh
            alike.
        projection: learned maps from the student's width to the teacher's, one "shared" by all states or one for
            "each"; None: none where the widths are equal, else "shared".
    """

    layers: Mapping[int, int]
    embedding: bool = False
    at: str = "output"
    distance: str = "cosine"
    alpha: float | None = None
    projection: str | None = None

    @property
    def pairs(self) -> list[tuple[Key, Key]]:
        """(teacher's, student's) keys of the compared states."""
        pairs: list[tuple[Key, Key]] = list(self.layers.items())
        return [(EMBEDDING, EMBEDDING), *pairs] if self.embedding else pairs


def late_map(teacher_layers: int, student_layers: int) -> dict[int, int]:
    """The third layer from the end of both (arXiv 2407.14679, table 17: 29 to 13 of 32 and 16)."""
    return {teacher_layers - 3: student_layers - 3}


def check_map(layers: Mapping[int, int], teacher_layers: int, student_layers: int) -> None:
    """Refuse a map from teacher to student layers that makes no sense. A teacher layer may be one that was pruned away.

    Raises:
        InputError: an index out of range, a student layer that is named twice, pairs that cross.
    """
    for teacher, student in layers.items():
        for name, index, count in (
            ("teacher", teacher, teacher_layers),
            ("student", student, student_layers),
        ):
            if not 0 <= index < count:
                raise InputError(
                    f"distill.intermediate.layers: {teacher}: {student}: the {name} has layers 0 to {count - 1}"
                )
    if len(set(layers.values())) != len(layers):
        raise InputError(f"distill.intermediate.layers={dict(layers)}: names a student layer twice")
    if (students := [layers[teacher] for teacher in sorted(layers)]) != sorted(students):
        raise InputError(
            f"distill.intermediate.layers={dict(layers)}: pairs cross; a later layer of the teacher must go with "
            "a later one of the student"
        )


@dataclass(frozen=True)
class Tap:
    """Where a state of this rank's model flows by.

    Attributes:
        module: its first output, or its first input, is what flows.
        at_output: which of both.
        state: maps that [s, b, h] to the state of the same shape ([s/tp, b, h] under sequence parallelism).
    """

    module: nn.Module
    at_output: bool
    state: Callable[[Tensor], Tensor]

    def attach(self, visit: Callable[[Tensor], Tensor]) -> Any:
        """Let `visit` see what flows by and say what flows on; returns the hook's handle."""

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return (visit(output[0]), *output[1:]) if isinstance(output, tuple) else visit(output)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if args:
                return (visit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"])}

        if self.at_output:
            return self.module.register_forward_hook(after)
        return self.module.register_forward_pre_hook(before, with_kwargs=True)


def taps(chunk: nn.Module, keys: Iterable[Key], at: str) -> dict[Key, Tap]:
    """The taps of those states that this rank's stage holds.

    Args:
        chunk: a GPTModel, or wrappers around one.
        keys: layers, or `EMBEDDING`.
        at: one of `PLACES`.
    """
    decoder = decoder_of(chunk)
    if at == "norm":
        sites = {site.row: site for site in norm_sites(decoder, include_final=True)}
        rows = {key: 0 if isinstance(key, str) else 2 * (key + 1) for key in keys}
        found = {key: sites[row] for key, row in rows.items() if row in sites}
        return {key: Tap(site.module, site.at_output, site.units) for key, site in found.items()}
    layers = dict(layers_of(decoder))
    places = {key: (0, False) if isinstance(key, str) else (key, True) for key in keys}
    return {key: Tap(layers[n], out, _as_it_is) for key, (n, out) in places.items() if n in layers}


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Projections(nn.Module):
    """Learned linear maps [h_t, h] from the student's width to the teacher's, alike on all tensor-parallel ranks.

    Args:
        keys: states that this stage maps.
        width, to_width: h and h_t.
        shared: one map for all.
        sequence_parallel: each tensor-parallel rank then sees its part of the tokens, and Megatron adds up gradients.
        dtype: of the weights.
    """

    def __init__(
        self,
        keys: Iterable[Key],
        width: int,
        to_width: int,
        *,
        shared: bool,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shared = shared
        names = ["shared"] if shared else sorted(self._name(key) for key in keys)
        # Of its own, so that all ranks start alike whatever seeds they have.
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterDict()
        for name in names:
            start = torch.randn(to_width, width, generator=generator) / width**0.5
            self.weights[name] = nn.Parameter(start.to(dtype))
            self.weights[name].sequence_parallel = sequence_parallel

    def _name(self, key: Key) -> str:
        return "shared" if self.shared else f"state_{key}"

    def forward(self, key: Key, x: Tensor) -> Tensor:
        """[..., h] to [..., h_t]."""
        weight = self.weights[self._name(key)]
        return F.linear(x.to(weight.dtype), weight)


def distance_sum(student: Tensor, teacher: Tensor, weight: Tensor, distance: str) -> Tensor:
    """Weighted sum of a distance over tokens, [] in float32.

    Args:
        student, teacher: [s, b, h], of the same shape.
        weight: [s, b].
        distance: one of `DISTANCES`.
    """
    x, y = student.float(), teacher.float()
    each = (x - y).square().mean(-1) if distance == "mse" else 1 - F.cosine_similarity(x, y, dim=-1)
    return (each * weight).sum()


def own_tokens(loss_mask: Tensor, sequence_parallel: bool) -> Tensor:
    """A loss mask [b, s] as [s, b], or the rank's [s/tp, b] of it."""
    mask = loss_mask.transpose(0, 1).float()
    return mask.chunk(parallel.tp_size(), dim=0)[parallel.tp_rank()] if sequence_parallel else mask


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape = loss
        # No view of x: a stage's output is freed by Megatron's schedule, which refuses views.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.shape)


def join(x: Tensor, loss: Tensor) -> Tensor:
    """x, which carries the gradient of a scalar loss back besides its own."""
    return _Join.apply(x, loss)
