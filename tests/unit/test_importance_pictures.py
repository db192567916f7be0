"""The picture of scores: a row for each metric of layers, and for each axis that was pruned."""

import struct
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from nemo_minitron.arch import Architecture
from nemo_minitron.importance.pictures import axes_of, depth_curves, heat_map, importance_picture
from nemo_minitron.importance.scores import Scores
from nemo_minitron.pruning import Kept

ARCH = Architecture(3, 16, 32, 4, 2, 4, 32)
TENSORS = {
    "hidden_size": torch.rand(16),
    "layers/lm_loss": torch.tensor([7.6, 2.4, 2.9]),
    "blocks/lm_loss/2": torch.tensor([8.0, 3.0]),
    # A model may be better without a layer.
    "layers/task": torch.tensor([0.5, -0.01, 0.0]),
}


def height(path: Path) -> int:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">I", header[20:24])[0]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        # Nothing was cut of it, and the layers have no curve: it is all that there is to see.
        (["hidden_size"], 1),
        (["layers/task"], 1),
        # An axis that was left alone is not drawn beside the curves that decided.
        (["hidden_size", "layers/lm_loss", "blocks/lm_loss/2"], 1),
        (list(TENSORS), 2),
    ],
)
def test_a_row_for_each_axis_and_metric(tmp_path: Path, names: list[str], rows: int) -> None:
    scores = Scores(ARCH, "", "l2", "mean", 1, 1, "", {name: TENSORS[name] for name in names})
    importance_picture(scores, Kept(layers=[0, 2]), tmp_path / "importance.png")
    assert height(tmp_path / "importance.png") == rows * 242


def test_ticks_are_plain_numbers_and_layers_have_theirs() -> None:
    width = {"ffn_hidden_size": torch.rand(3, 32), "hidden_size": torch.rand(16)}
    scores = Scores(ARCH, "", "l2", "mean", 1, 1, "", TENSORS | width)
    kept = Kept(ffn_hidden_size=[list(range(8))] * 3)
    assert axes_of(scores, kept) == (["ffn_hidden_size"], ["hidden_size"])
    figure = Figure()
    curves, map_ = figure.subplots(2, 1)
    depth_curves(curves, scores, "lm_loss", [0, 2])
    heat_map(map_, scores, "ffn_hidden_size", kept)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in curves.get_yticklabels()]
    assert all("e" not in label and "^" not in label for label in labels)
    assert len([label for label in labels if label]) >= 2
    assert [label.get_text() for label in map_.get_yticklabels()] == ["0", "1", "2"]
    # The legend lies outside of the curves.
    assert curves.get_legend().get_window_extent().y0 >= curves.get_window_extent().y1
