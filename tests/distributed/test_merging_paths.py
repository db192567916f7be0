"""Paths through the layers of several models: Megatron under layouts, and folded weights, against transformers' own
layers put together by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.errors import InputError
from nemo_minitron.merging.models import opened
from nemo_minitron.merging.path import Laid, Slot, distinct, folds, read_path, text_of
from tests.support import merge_paths
from tests.support.hf_families import VOCAB_SIZE, make_model

PATH = "0:0-2,1:0*0.8,0:1-2*1.25,1:2*-0.75,0:3"
SLOTS = [
    (0, 0, 1.0),
    (0, 1, 1.0),
    (0, 2, 1.0),
    (1, 0, 0.8),
    (0, 1, 1.25),
    (0, 2, 1.0),
    (1, 2, -0.75),
    (0, 3, 1.0),
]
TOKENS = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(4))
# Tied embeddings have a copy on the last stage; LayerNorm's gamma is zero-centred.
FAMILIES = ["mistral", "qwen3", "nemotron"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], list[str]]:
    """Two models of one family and of another depth, and their directories."""
    home = tmp_path_factory.mktemp(f"paths-{request.param}")
    one = make_model(home / "one", request.param)
    two = make_model(home / "two", request.param, num_hidden_layers=3)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    two.save_pretrained(home / "two")
    return [one, two], [str(home / "one"), str(home / "two")]


@pytest.mark.parametrize(
    ("world", "sizes", "shared"),
    [(1, {}, 2), (2, {"tp": 2}, 2), (2, {"tp": 2, "sp": True}, 2), (2, {"pp": 2}, 0)],
    ids=["one", "tp", "sp", "pp"],
)
def test_megatron_runs_a_path(
    run_on_ranks: Any, pair: tuple[list[Any], list[str]], world: int, sizes: dict[str, Any], shared: int
) -> None:
    models, directories = pair
    expected = merge_paths.by_hand(models, SLOTS, TOKENS)
    for logits, count in run_on_ranks(
        world, merge_paths.of_megatron, directories, PATH, TOKENS, sizes, False, timeout=120
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        # The repeats of this path lie on the other stage.
        assert count == shared
    if "pp" not in sizes:
        for logits, _ in run_on_ranks(
            world, merge_paths.of_megatron, directories, PATH, TOKENS, sizes, True, timeout=120
        ):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def opened_pair(directories: list[str]) -> tuple[list[Any], Any]:
    sources = [find_source(directory) for directory in directories]
    return [opened(source, "m") for source in sources], sources[0].architecture


def logits_of(models: list[Any], laid: Laid) -> Tensor:
    """What transformers makes of the tensors."""
    made = copy.deepcopy(models[0])
    layers = [copy.deepcopy(made.model.layers[0]) for _ in laid.path]
    made.model.layers, made.config.num_hidden_layers = torch.nn.ModuleList(layers), len(layers)
    weights = {name: laid.read(name) for name in laid.parts}
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if laid.of.share_embeddings_and_output_weights else set())
    with torch.no_grad():
        return made(TOKENS, use_cache=False).logits


def test_scales_fold_into_weights(pair: tuple[list[Any], list[str]]) -> None:
    """Negative ones, too; a model whose layers are stored once computes the same through its own path."""
    models, directories = pair
    readers, arch = opened_pair(directories)
    expected = merge_paths.by_hand(models, SLOTS, TOKENS)
    path = read_path(PATH, [4, 3])
    assert [(slot.model, slot.layer, slot.scale) for slot in path] == SLOTS
    torch.testing.assert_close(logits_of(models, Laid(path, readers, arch)), expected, rtol=1e-4, atol=1e-4)
    plain = logits_of(models, Laid(path, readers, arch, folded=False))
    assert (plain - expected).abs().max() > 0.1
    stored, through = distinct(Laid(path, readers, arch, folded=False))
    assert len(stored.path) == 6
    again = Laid(through, [stored], arch)
    torch.testing.assert_close(logits_of(models, again), expected, rtol=1e-4, atol=1e-4)


def test_a_path_is_written_as_it_is_read() -> None:
    path = read_path(PATH, [4, 3])
    assert text_of(path) == PATH
    assert read_path(text_of(path), [4, 3]) == path
    assert folds(path)
    assert not folds((Slot(0, 0), Slot(0, 1, 0.0)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["must be MODEL:LAYER"]),
        ("0:0-2;1:0", ["must be MODEL:LAYER"]),
        ("2:0", ["model 2: there are 2 models"]),
        ("1:3", ["model 1 has the layers 0 to 2"]),
        ("0:2-1", ["0:2-1", "layers 0 to 3"]),
        ("0:1*x", ["0:1*x", "finite number"]),
        ("0:1*nan", ["finite number"]),
        ("0:0" + ",0:0-3" * 3000, ["at most 10,000"]),
    ],
)
def test_paths_that_are_refused(text: str, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_path(text, [4, 3])
    for part in ("merge.path=", *says):
        assert part in str(caught.value)
