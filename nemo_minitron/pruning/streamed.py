"""A plan carried out on the tensors of a Hugging Face model, a block of rows at a time: no model is in memory.

What an axis cuts is said in `pruning.width`, by Megatron-core's names; which rows of Megatron's fused tensors a Hugging
Face tensor holds is said in `export.tensors`. Both are taken from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nemo_minitron.export.tensors import Part, fused_rows, parts, split
from nemo_minitron.pruning import width
from nemo_minitron.pruning.plan import PrunePlan

_BLOCK_BYTES = 32 << 20
_CPU = torch.device("cpu")


class PrunedWeights:
    """The weights of a plan's target as Hugging Face tensors, cut out of its source's while they are read.

    Args:
        plan: its source has a `model_type`.
        read: gives a tensor of the source by its Hugging Face name, on the CPU.
    """

    def __init__(self, plan: PrunePlan, read: Callable[[str], Tensor]) -> None:
        self.plan, self.architecture = plan, plan.target
        self.parts = {part.name: part for part in parts(plan.target)}
        self._read = read
        self._sources = {_place(part): part for part in parts(plan.source)}
        self._chosen: tuple[int | None, width.Selections] | None = None

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor's kept rows and columns, in the source's dtype.

        Args:
            name: of the target's.

        Returns:
            Blocks [rows, columns] or [rows]; those that need no cutting are views of what `read` gave.
        """
        part = self.parts[name]
        layer = None if part.layer is None else self.plan.source_layers[part.layer]
        source = self._sources[_place(replace(part, layer=layer))]
        tensor = self._read(source.name)
        if self.plan.head_residual is not None and part.part == "q":
            tensor = self._with_residual(part, source, tensor)
        rows, *columns = self._kept(part, source)
        step = max(1, _BLOCK_BYTES // (part.shape[-1] * tensor.element_size()))
        for begin in range(0, part.shape[0], step):
            some = slice(begin, begin + step)
            if rows is None and columns in ([], [None]):
                yield tensor[some]
            elif rows is None:
                yield width.kept_part(tensor[some], None, *columns)
            else:
                yield width.kept_part(tensor, rows[some], *columns)

    def _kept(self, part: Part, source: Part) -> list[Tensor | None]:
        """What stays of each dimension of a source tensor, as int64 indices; None: all."""
        chosen = self._selections(part.layer)
        axes = width.axes_of(part.key)
        kept = [chosen[axis].by_owner[0] if axis in chosen else None for axis in axes]
        if kept[0] is not None and part.part != "all":
            # Numbers of fused rows: those that the part keeps, among those that it has.
            own = self._own_rows(source)
            kept[0] = torch.searchsorted(own, split(self.plan.target, part.part, kept[0]))
        return kept

    def _selections(self, layer: int | None) -> width.Selections:
        """Those of a layer of the target; a layer's tensors follow each other, so the last ones are kept."""
        if self._chosen is None or self._chosen[0] != layer:
            plan = self.plan
            found = (
                width.hidden_selection(plan, _CPU) if layer is None else width.selections(plan, layer, _CPU)
            )
            self._chosen = (layer, found)
        return self._chosen[1]

    def _own_rows(self, source: Part) -> Tensor:
        """The numbers of the fused rows that a part of the source is, ascending, int64."""
        return split(self.plan.source, source.part, torch.arange(fused_rows(self.plan.source, source)))

    def _with_residual(self, part: Part, source: Part, queries: Tensor) -> Tensor:
        """The queries of a layer, [rows, h] or [rows], after kept heads have taken in pruned ones."""
        assert part.layer is not None
        own = self._own_rows(source)
        fused = queries.new_zeros(fused_rows(self.plan.source, source), *queries.shape[1:])
        fused[own] = queries
        return width.add_head_residual(fused, self.plan, part.layer)[own]


def _place(part: Part) -> tuple[str, int | None, str]:
    return part.key, part.layer, part.part
