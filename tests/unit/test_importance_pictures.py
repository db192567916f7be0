"""The picture of scores: a row for each axis and for each metric of layers."""

import struct
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.importance.pictures import importance_picture
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
        (["hidden_size"], 1),
        (["layers/task"], 1),
        (["hidden_size", "layers/lm_loss", "blocks/lm_loss/2"], 2),
        (list(TENSORS), 3),
    ],
)
def test_a_row_for_each_axis_and_metric(tmp_path: Path, names: list[str], rows: int) -> None:
    scores = Scores(ARCH, "", "l2", "mean", 1, 1, "", {name: TENSORS[name] for name in names})
    importance_picture(scores, Kept(layers=[0, 2]), tmp_path / "importance.png")
    assert height(tmp_path / "importance.png") == rows * 242
