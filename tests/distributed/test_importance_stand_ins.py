"""What Megatron's local layers cannot run on a CPU: context parallelism, and virtual pipeline stages.

Modules of a GPT's shape pass given activations through, each rank its own part of them. Scores must be
those of the whole activations.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nemo_minitron import parallel
from nemo_minitron.importance import BlockInfluenceCollector, ImportanceCollector
from nemo_minitron.importance.aggregation import STATISTICS
from tests.support.expected_scores import aggregate
from tests.support.ranks import layout

LAYERS, S, B, H, F, HEADS, GROUPS, D = 4, 8, 3, 6, 8, 4, 2, 3


def activations() -> dict[str, list[Tensor]]:
    """Global ones [s, b, ...], by name and layer; `states` are the residual stream's, one more than
    layers."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda n: torch.randn(S, B, n, generator=generator)  # noqa: E731
    kinds = {"norm1": H, "attention": HEADS * D, "norm2": H, "ffn": F}
    values = {kind: [draw(n) for _ in range(LAYERS)] for kind, n in kinds.items()}
    return {**values, "states": [draw(H) for _ in range(LAYERS + 1)], "final": [draw(H)]}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Layer(nn.Module):
    def __init__(self, index: int, given: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.layer_number, self.given = index + 1, {k: v[index] for k, v in given.items() if k != "final"}
        self.after = given["states"][index + 1]
        self.input_layernorm, self.pre_mlp_layernorm = Norm(), Norm()
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.linear_qkv, self.self_attention.linear_proj = nn.Identity(), nn.Identity()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        assert torch.equal(hidden_states, self.given["states"])
        self.input_layernorm(self.given["norm1"])
        self.self_attention.linear_proj(self.given["attention"])
        self.pre_mlp_layernorm(self.given["norm2"])
        self.mlp.linear_fc2(self.given["ffn"])
        return self.after, None


class Decoder(nn.Module):
    def __init__(self, indices: list[int], given: dict[str, list[Tensor]], sp: bool) -> None:
        super().__init__()
        sizes = {"num_layers": LAYERS, "hidden_size": H, "ffn_hidden_size": F, "kv_channels": D}
        sizes |= {"num_attention_heads": HEADS, "num_query_groups": GROUPS}
        self.config = SimpleNamespace(**sizes, sequence_parallel=sp)
        self.layers = nn.ModuleList([Layer(index, given) for index in indices])
        self.final = given["final"][0]
        self.final_layernorm = Norm() if LAYERS - 1 in indices else None

    def forward(self) -> Tensor:
        x = self.layers[0].given["states"]
        for layer in self.layers:
            x, _ = layer(hidden_states=x)
        return x if self.final_layernorm is None else self.final_layernorm(self.final)


class Chunk(nn.Module):
    def __init__(self, *args) -> None:
        super().__init__()
        self.decoder = Decoder(*args)


def own_part(given: dict[str, list[Tensor]], sp: bool) -> dict[str, list[Tensor]]:
    """The rank's tokens and units."""

    def cut(kind: str, x: Tensor) -> Tensor:
        x = x.chunk(parallel.cp_size())[parallel.cp_rank()]
        if kind in ("attention", "ffn"):
            return x.chunk(parallel.tp_size(), dim=-1)[parallel.tp_rank()]
        return x.chunk(parallel.tp_size())[parallel.tp_rank()] if sp else x

    return {kind: [cut(kind, x) for x in xs] for kind, xs in given.items()}


def score(sizes: dict, chunks_of_stage: list, batch: str, sequence: str) -> dict[str, Tensor]:
    at = layout(**sizes)
    given = own_part(activations(), at.sp)
    chunks = [Chunk(indices, given, at.sp) for indices in chunks_of_stage[parallel.pp_rank()]]
    collector = ImportanceCollector(chunks, batch=batch, sequence=sequence)
    depth = BlockInfluenceCollector(chunks, [1])
    with collector, depth:
        for chunk in chunks:
            chunk.decoder()
    assert (collector.samples, collector.tokens) == (B, B * S)
    return {**collector.finish(), **depth.finish()}


def expected_scores(batch: str, sequence: str) -> dict[str, Tensor]:
    given = {kind: [x.transpose(0, 1) for x in xs] for kind, xs in activations().items()}
    heads = [x.unflatten(-1, (HEADS, D)).norm(dim=-1) for x in given["attention"]]
    by_head = torch.stack([aggregate(x, batch, sequence) for x in heads])
    norms = given["norm1"] + given["norm2"] + given["final"]
    cosines = [torch.cosine_similarity(x, y, dim=-1) for x, y in itertools.pairwise(given["states"])]
    return {
        "ffn_hidden_size": torch.stack([aggregate(x, batch, sequence) for x in given["ffn"]]),
        "num_attention_heads": by_head,
        "num_query_groups": by_head.view(LAYERS, GROUPS, -1).sum(-1),
        "hidden_size": sum(aggregate(x, batch, sequence) for x in norms),
        "layers/block_influence": torch.stack([1 - cosine.mean() for cosine in cosines]),
    }


WHOLE = [[[0, 1, 2, 3]]]
CASES = {
    "cp2": (2, {"cp": 2}, WHOLE),
    "cp2-tp2-sp": (4, {"cp": 2, "tp": 2, "sp": True}, WHOLE),
    "virtual-pp2": (2, {"pp": 2}, [[[0], [2]], [[1], [3]]]),
}


@pytest.mark.parametrize(("world_size", "sizes", "chunks"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("batch", ["l2", "var"])
@pytest.mark.parametrize("sequence", STATISTICS)
def test_sequences_and_layers_may_be_spread(run_on_ranks, world_size, sizes, chunks, batch, sequence):
    for scores in run_on_ranks(world_size, score, sizes, chunks, batch, sequence):
        for name, values in expected_scores(batch, sequence).items():
            torch.testing.assert_close(scores[name].double(), values.double(), rtol=1e-4, atol=1e-6)
