"""Scores as a file: what comes back, and what is refused."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.importance import Scores

ARCH = Architecture(3, 8, 12, 4, 2, 2, vocab_size=16)
SHAPES = {
    "hidden_size": (8,),
    "ffn_hidden_size": (3, 12),
    "num_attention_heads": (3, 4),
    "num_query_groups": (3, 2),
    "layers/block_influence": (3,),
    "blocks/angular_distance/2": (2,),
}


def make(**changes) -> Scores:
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    values = {"architecture": ARCH, "source_sha256": "ab" * 32, "batch": "l2", "sequence": "mean"}
    return Scores(
        **{**values, "samples": 7, "tokens": 70, "data_sha256": "cd" * 32, "tensors": tensors, **changes}
    )


def test_what_is_saved_is_loaded(tmp_path):
    scores = make()
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.tensors.keys() == SHAPES.keys()
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, scores.tensors[name])
    for field in dataclasses.fields(Scores):
        if field.name != "tensors":
            assert getattr(loaded, field.name) == getattr(scores, field.name)


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    make(samples=1).save(path)

    def disk_full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("nemo_minitron.importance.scores.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        make(samples=2).save(path)
    assert Scores.load(path).samples == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_the_scored_model_matches():
    scores = make()
    scores.check_matches(ARCH, "ab" * 32)
    with pytest.raises(InputError, match="another model: it has ffn_hidden_size=12, the source 16"):
        scores.check_matches(ARCH.replace(ffn_hidden_size=16), "ab" * 32)
    with pytest.raises(
        InputError, match="another model: .* digest abababababab, the source has efefefefefef"
    ):
        scores.check_matches(ARCH, "ef" * 32)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("ffn_hidden_size", (3, 11), r"shape \[3, 11\], must be \[3, 12\]"),
        ("blocks/block_influence/2", (3,), r"shape \[3\], must be \[2\]"),
        ("blocks/block_influence/4", (0,), "must be one of"),
        ("kv_channels", (2,), "'kv_channels': must be one of"),
    ],
)
def test_tensors_must_fit_the_architecture(name, shape, message):
    with pytest.raises(InputError, match=message):
        make(tensors={name: torch.zeros(shape)})


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="no such scores file"):
        Scores.load(path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(InputError, match="not a scores file"):
        Scores.load(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not one with scores"):
        Scores.load(path)
    save_file({}, path, {"nemo_minitron.scores": '{"version": 9}'})
    with pytest.raises(InputError, match="version 9, this program reads version 1"):
        Scores.load(path)
    save_file({}, path, {"nemo_minitron.scores": "{"})
    with pytest.raises(InputError, match="damaged"):
        Scores.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a scores file"):
        Scores.load(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((8,), torch.inf), "scores of 'hidden_size': must be finite floating-point numbers"),
        (torch.tensor([1.0] * 7 + [torch.nan]), "scores of 'hidden_size': must be finite"),
        (torch.ones(8, dtype=torch.int64), "scores of 'hidden_size': must be finite floating-point numbers"),
        (torch.ones(8, dtype=torch.bool), "scores of 'hidden_size': must be finite floating-point numbers"),
    ],
)
def test_scores_that_are_none_are_refused(tmp_path, tensor, message):
    """A plan would be made of them without a word."""
    path = tmp_path / "scores.safetensors"
    make().save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in SHAPES}
    save_file({**tensors, "hidden_size": tensor}, path, metadata)
    with pytest.raises(InputError, match=message):
        Scores.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", "7"),
        ("samples", 0),
        ("tokens", 7.5),
        ("tokens", True),
        ("batch", "median"),
        ("data_sha256", 3),
    ],
)
def test_what_no_scoring_says_is_refused(tmp_path, key, value):
    path = tmp_path / "scores.safetensors"
    make(**{key: value}).save(path)
    with pytest.raises(InputError, match=f"damaged scores file .{key} '"):
        Scores.load(path)
