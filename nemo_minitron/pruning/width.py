"""Width: a layer's parameters cut to the kept units; units move between tensor-parallel ranks, one layer at
a time.

A plan keeps the best units over all ranks, so one rank may hold more than its share of them. After the cut
each rank holds an equal, contiguous share of the kept units in their original order, as Megatron shards a
model of that size.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nemo_minitron import parallel
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.plan import PrunePlan

# What the dimensions of each parameter of a layer mean, under the local and the Transformer Engine spec's
# names (megatron-core@0.13.1 models/gpt/gpt_layer_specs.py); None is never cut.
LAYER_AXES: dict[str, tuple[str | None, ...]] = {
    "input_layernorm.weight": ("hidden",),
    "input_layernorm.bias": ("hidden",),
    "pre_mlp_layernorm.weight": ("hidden",),
    "pre_mlp_layernorm.bias": ("hidden",),
    "self_attention.linear_qkv.layer_norm_weight": ("hidden",),
    "self_attention.linear_qkv.layer_norm_bias": ("hidden",),
    "self_attention.linear_qkv.weight": ("qkv", "hidden"),
    "self_attention.linear_qkv.bias": ("qkv",),
    "self_attention.q_layernorm.weight": (None,),
    "self_attention.q_layernorm.bias": (None,),
    "self_attention.k_layernorm.weight": (None,),
    "self_attention.k_layernorm.bias": (None,),
    "self_attention.linear_proj.weight": ("hidden", "heads"),
    "self_attention.linear_proj.bias": ("hidden",),
    "mlp.linear_fc1.layer_norm_weight": ("hidden",),
    "mlp.linear_fc1.layer_norm_bias": ("hidden",),
    "mlp.linear_fc1.weight": ("fc1", "hidden"),
    "mlp.linear_fc1.bias": ("fc1",),
    "mlp.linear_fc2.weight": ("hidden", "ffn"),
    "mlp.linear_fc2.bias": ("hidden",),
}
OUTER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding.word_embeddings.weight": (None, "hidden"),
    "embedding.position_embeddings.weight": (None, "hidden"),
    "decoder.final_layernorm.weight": ("hidden",),
    "decoder.final_layernorm.bias": ("hidden",),
    "output_layer.weight": (None, "hidden"),
    "output_layer.bias": (None,),
}
_LAYERS = "decoder.layers."
# Of a chunk: small enough for a core's cache.
_COPIED_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Selection:
    """What this rank keeps along one dimension of a parameter.

    Attributes:
        by_owner: int64 indices into the rank's own part; one tensor for each tensor-parallel rank that will
            own them, or a single one where no unit changes its rank (or the dimension is not sharded).
        halves: the dimension is [gate; up], and so is each tensor of `by_owner`.
    """

    by_owner: tuple[Tensor, ...]
    halves: bool = False


Selections = dict[str, Selection]


def axes_of(key: str) -> tuple[str | None, ...]:
    """What the dimensions of a tensor mean, by its name in a NeMo 2 checkpoint, there without that of the layers."""
    name = key.removeprefix("module.")
    return OUTER_AXES[name] if name in OUTER_AXES else LAYER_AXES[name.removeprefix(_LAYERS)]


def check_parameters(model: Module) -> None:
    """Refuse a model with a parameter that the tables above do not name.

    Raises:
        InputError: names the parameter.
    """
    for name, _ in model.named_parameters():
        inner = name.split(".", 3)[-1] if name.startswith(_LAYERS) else None
        if inner not in LAYER_AXES and name not in OUTER_AXES:
            raise InputError(
                f"parameter {name}: pruning does not know it; dense GPT models without adapters are supported"
            )


def selections(plan: PrunePlan, layer: int, device: torch.device) -> Selections:
    """This rank's selections for the target's layer `layer` (0-based, global); axes left alone are absent."""
    source, kept, found = plan.source, plan.kept, hidden_selection(plan, device)
    if kept.ffn_hidden_size is not None:
        neurons = _shares(kept.ffn_hidden_size[layer], source.ffn_hidden_size)
        found["ffn"] = Selection(_indices(neurons, device, lambda neuron: [neuron]))
        found["fc1"] = found["ffn"]
        if source.gated_linear_unit:
            offset = source.ffn_hidden_size // parallel.tp_size()
            pairs = tuple(torch.cat((part, part + offset)) for part in found["ffn"].by_owner)
            found["fc1"] = Selection(pairs, halves=True)
    if kept.num_attention_heads is not None:
        found |= _attention_selections(plan, layer, device)
    return found


def hidden_selection(plan: PrunePlan, device: torch.device) -> Selections:
    """The selection of `hidden_size`, alike on all ranks and in all layers; empty if it is left alone."""
    if plan.kept.hidden_size is None:
        return {}
    return {"hidden": Selection((torch.tensor(plan.kept.hidden_size, device=device),))}


def _attention_selections(plan: PrunePlan, layer: int, device: torch.device) -> Selections:
    """Query groups move as a whole: [query heads, key, value] in linear_qkv, [query heads] in linear_proj."""
    source, d, old = plan.source, plan.source.kv_channels, plan.source.heads_per_group
    assert plan.kept.num_attention_heads is not None
    first = parallel.tp_rank() * (source.num_query_groups // parallel.tp_size())
    heads: dict[int, list[int]] = {}
    for head in plan.kept.num_attention_heads[layer]:
        heads.setdefault(head // old, []).append(head % old)

    def blocks(group: int, width: int, places: Sequence[int]) -> list[int]:
        return [(group * width + place) * d + channel for place in places for channel in range(d)]

    def qkv_rows(group: int) -> list[int]:
        return blocks(group, old + 2, [*heads[first + group], old, old + 1])

    def proj_columns(group: int) -> list[int]:
        return blocks(group, old, heads[first + group])

    shares = _shares(sorted(heads), source.num_query_groups)
    return {
        "qkv": Selection(_indices(shares, device, qkv_rows)),
        "heads": Selection(_indices(shares, device, proj_columns)),
    }


def _shares(kept: Sequence[int], total: int) -> list[list[int]]:
    """The kept units that this rank holds, as local indices, by the rank that will own them.

    A single list where every kept unit, on whatever rank, stays where it is: all ranks see the same plan,
    so all come to the same answer, and no rank deadlocks.
    """
    ranks, rank = parallel.tp_size(), parallel.tp_rank()
    old, new = total // ranks, len(kept) // ranks
    owners = [(unit // old, position // new, unit) for position, unit in enumerate(kept)]
    if all(holder == owner for holder, owner, _ in owners):
        return [[unit - rank * old for holder, _, unit in owners if holder == rank]]
    return [
        [unit - rank * old for holder, owner, unit in owners if (holder, owner) == (rank, other)]
        for other in range(ranks)
    ]


def _indices(
    shares: list[list[int]], device: torch.device, expand: Callable[[int], list[int]]
) -> tuple[Tensor, ...]:
    return tuple(
        torch.tensor([i for unit in share for i in expand(unit)], dtype=torch.int64, device=device)
        for share in shares
    )


def cut(parameter: Parameter, axes: Sequence[str | None], chosen: Selections) -> Parameter:
    """The parameter's kept part, with its dtype, device, requires_grad and Megatron's attributes.

    The old parameter's memory is released as soon as it is copied from; it is unusable afterwards. A
    parameter of which everything stays is returned as it is. Every rank of the tensor-parallel group has to
    call this.

    Args:
        parameter: [rows, columns] or [rows], this rank's shard.
        axes: what its dimensions mean, from the tables above.
        chosen: this rank's selections.
    """
    along = [chosen.get(axis) if axis else None for axis in axes]
    if not any(along):
        return parameter
    options = [selection.by_owner if selection else (None,) for selection in along]
    pieces = [kept_part(parameter.detach(), rows, *rest) for rows, *rest in _product(options)]
    like = Attributes.of(parameter)
    parameter.grad = None
    parameter.data = parameter.data.new_empty(0)
    if len(pieces) == 1:
        return like.put_on(pieces[0])
    dim = next(i for i, option in enumerate(options) if len(option) > 1)
    sharded = along[dim]
    assert sharded is not None
    return like.put_on(_exchange(pieces, dim, sharded.halves))


def _product(options: Sequence[Sequence[Tensor | None]]) -> Iterator[tuple[Tensor | None, ...]]:
    assert sum(len(option) > 1 for option in options) <= 1, "one dimension at most is sharded"
    longest = max(len(option) for option in options)
    for i in range(longest):
        yield tuple(option[i if len(option) > 1 else 0] for option in options)


def kept_part(t: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> Tensor:
    """A contiguous copy of t's given rows and columns (None: all), with little memory besides the copy."""
    if columns is None:
        assert rows is not None
        return t.index_select(0, rows)
    copy = t.new_empty(len(t) if rows is None else len(rows), len(columns))
    step = max(1, _COPIED_ELEMENTS // t.shape[1])
    starts = range(0, len(copy), step)

    def fill(some_starts: Sequence[int]) -> None:
        whole = t.new_empty(min(step, len(copy)), t.shape[1]) if rows is not None else None
        for start in some_starts:
            target = copy[start : start + step]
            some = t[start : start + step]
            if rows is not None:
                assert whole is not None
                some = whole[: len(target)]
                _take(t, rows[start : start + step], 0, some)
            _take(some, columns, 1, target)

    _in_threads(fill, starts, 1 if t.is_cuda else torch.get_num_threads())
    return copy


def _in_threads(work: Callable[[Sequence[int]], None], starts: Sequence[int], threads: int) -> None:
    """Torch copies with all its threads, but selects with one."""
    threads = min(threads, len(starts))
    if threads <= 1:
        work(starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, [starts[i::threads] for i in range(threads)]):
            pass


def _take(t: Tensor, indices: Tensor, dim: int, out: Tensor) -> None:
    """`torch.index_select` into contiguous memory; on a CPU numpy does it faster for 16-bit numbers (torch 2.13)."""
    if t.element_size() != 2 or t.is_cuda or not out.numel():
        torch.index_select(t, dim, indices, out=out)
        return
    # numpy knows no bfloat16; bytes are bytes. "clip" spares it the buffer that "raise" needs.
    values, target = t.view(torch.int16).numpy(), out.view(torch.int16).numpy()
    values.take(indices.numpy(), axis=dim, out=target, mode="clip")


def _exchange(pieces: list[Tensor], dim: int, halves: bool) -> Tensor:
    """Give pieces[r] to rank r along `dim` and join what comes back; what stays here is not sent."""
    rank = parallel.tp_rank()
    own, pieces[rank] = pieces[rank], pieces[rank].narrow(dim, 0, 0)
    for i, piece in enumerate(pieces):
        pieces[i] = piece.movedim(dim, 0).contiguous()
    received = parallel.exchange_tp(pieces)
    pieces.clear()
    joined = [own if i == rank else piece.movedim(0, dim) for i, piece in enumerate(received)]
    if not halves:
        return torch.cat(joined, dim)
    return torch.cat([piece.unflatten(0, (2, -1)) for piece in joined], 1).flatten(0, 1)


@dataclass(frozen=True)
class Attributes:
    """What a parameter carries besides its values: Megatron marks them (tensor_model_parallel, shared,
    ...)."""

    requires_grad: bool
    marks: dict[str, bool | int | str | float | None]

    @classmethod
    def of(cls, parameter: Parameter) -> "Attributes":
        """The attributes of a parameter."""
        # Gradient buffers hang on parameters too, and have the old size.
        plain = {
            k: v for k, v in vars(parameter).items() if v is None or isinstance(v, bool | int | str | float)
        }
        return cls(parameter.requires_grad, plain)

    def put_on(self, values: Tensor) -> Parameter:
        """A parameter of these values (which it takes over) and attributes."""
        parameter = Parameter(values.contiguous(), requires_grad=self.requires_grad)
        for name, mark in self.marks.items():
            setattr(parameter, name, mark)
        return parameter


def add_head_residual(weight: Tensor, plan: PrunePlan, layer: int) -> Tensor:
    """A copy of linear_qkv's weight (or bias) in which kept query heads have taken in pruned ones.

    q_kept + (q_kept - q_pruned) for the plan's pairs (arXiv 2407.14679 §2.2); keys and values stay.

    Args:
        weight: [groups/tp * (heads per group + 2) * kv_channels, h] or the bias without h, this rank's shard.
        plan: with `head_residual`.
        layer: of the target, 0-based.
    """
    assert plan.head_residual is not None
    per_group, groups = plan.source.heads_per_group, plan.source.num_query_groups // parallel.tp_size()
    first = parallel.tp_rank() * groups * per_group
    by_head = weight.detach().clone().unflatten(0, (groups, per_group + 2, plan.source.kv_channels))
    for kept, pruned in plan.head_residual[layer]:
        if 0 <= kept - first < groups * per_group:
            group, place = divmod(kept - first, per_group)
            head, other = by_head[group, place], by_head[group, (pruned - first) % per_group]
            head.copy_(2 * head.float() - other.float())
    return by_head.flatten(0, 2)
