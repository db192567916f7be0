"""The width axes of a GPT, each described once: scoring, plans, targets, search and pictures loop over them.

What an axis is made of in a model stays where the model is: `importance.hook_points` (where its activations are) and
`pruning.width` (which parameters it cuts). docs/extending.md has the steps of adding one. Imports nothing heavy.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Axis:
    """One width axis.

    Attributes:
        name: Megatron-core's, a field of `Architecture`, of `config.recipes.PruneConfig` and of `pruning.plan.Kept`.
        letter: in a search candidate's name.
        hooks: the kind of place at which its units are scored, a key of `importance.hook_points.KINDS`.
        per_layer: whether each layer chooses its own units; else the whole network has one choice.
        parent: the axis whose units hold equal numbers of this one's (heads in query groups); None: none.
        sharded: whether tensor-parallel ranks share its units out.
        tiled: whether sizes that fractions give are rounded to tiles of a matrix product.
    """

    name: str
    letter: str
    hooks: str
    per_layer: bool = True
    parent: str | None = None
    sharded: bool = True
    tiled: bool = False

    def size(self, sizes: Any) -> int:
        """Its units in an `Architecture` or in a Megatron-core config, global."""
        return int(getattr(sizes, self.name))

    def score_shape(self, sizes: Any) -> tuple[int, ...]:
        """Of its global scores: [num_layers, units], or [units] where the network has one choice."""
        return (sizes.num_layers, self.size(sizes)) if self.per_layer else (self.size(sizes),)


# Parents come after their children: `pruning.ranking.random_scores` draws in this order, and its seeds are published.
AXES = (
    Axis("hidden_size", "h", "norms", per_layer=False, sharded=False, tiled=True),
    Axis("ffn_hidden_size", "f", "ffn", tiled=True),
    Axis("num_attention_heads", "a", "heads", parent="num_query_groups"),
    Axis("num_query_groups", "g", "heads"),
)
BY_NAME = {axis.name: axis for axis in AXES}
WIDTH_AXES = tuple(BY_NAME)
PRUNABLE = (*WIDTH_AXES, "num_layers")


def units_per_parent(axis: Axis, sizes: Any) -> int:
    """How many of an axis's units one unit of its parent holds."""
    assert axis.parent is not None
    return axis.size(sizes) // BY_NAME[axis.parent].size(sizes)
