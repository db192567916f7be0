"""Runs recipes/export.py as in_turn.py does, and damages what it wrote before it is verified.

python damaged_exports.py < cases.json > answers.json

A case's environment names the damage; the files are changed by their formats' own libraries.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.refusals import answer

DAMAGE = "DAMAGE"
_ROTATED = "model.layers.1.self_attn.q_proj.weight"


def _tensors(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    file = place / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _config(place: Path, **values: Any) -> None:
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _heads(place: Path, tensors: dict[str, Any]) -> None:
    """llama.cpp's order of the channels instead of transformers'."""
    heads, old = json.loads((place / "config.json").read_text())["num_attention_heads"], tensors[_ROTATED]
    new = old.view(heads, 2, -1, old.shape[1]).transpose(1, 2).reshape(old.shape)
    tensors[_ROTATED] = new.contiguous()


def _swap(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][[3, 4]] = tensors["model.layers.1.mlp.down_proj.weight"][
        [4, 3]
    ]


HUGGING_FACE: dict[str, Callable[[Path], object]] = {
    "two rows": lambda place: _tensors(place, _swap),
    "rotation": lambda place: _tensors(place, lambda tensors: _heads(place, tensors)),
    "no norm": lambda place: _tensors(place, lambda t: t.pop("model.layers.1.input_layernorm.weight")),
    "a norm of ones": lambda place: _tensors(place, lambda t: t["model.norm.weight"].fill_(1)),
    "tied": lambda place: _config(place, tie_word_embeddings=True),
    "two heads": lambda place: _tensors(place, lambda t: t.update(other=t["lm_head.weight"].clone())),
}


def _in_place(place: Path, name: str, change: Callable[[Any], Any]) -> None:
    import gguf

    (file,) = place.glob("*.gguf")
    (data,) = (tensor.data for tensor in gguf.GGUFReader(file, "r+").tensors if tensor.name == name)
    data[:] = change(np.array(data))


def _turn(values: Any) -> Any:
    """transformers' order of the channels, of heads that are 8 wide."""
    return values.reshape(-1, 4, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _renamed(place: Path, name: bytes, other: bytes) -> None:
    (file,) = place.glob("*.gguf")
    held = file.read_bytes()
    assert held.count(name) == 1
    file.write_bytes(held.replace(name, other))


GGUF: dict[str, Callable[[Path], object]] = {
    "two rows": lambda place: _in_place(
        place, "blk.1.ffn_down.weight", lambda v: v[[0, 1, 2, 4, 3, *range(5, len(v))]]
    ),
    "rotation": lambda place: _in_place(place, "blk.1.attn_q.weight", _turn),
    "no norm": lambda place: _renamed(place, b"blk.1.ffn_norm.weight", b"blk.1.ffn_none.weight"),
    "tied": lambda place: _renamed(
        place, b"\x0d\0\0\0\0\0\0\0output.weight", b"\x0d\0\0\0\0\0\0\0outpot.weight"
    ),
}


def _first(damage: Callable[[Path], object], verify: Callable[..., Any]) -> Callable[..., Any]:
    def damaged(prepared: Any, place: Path, *rest: Any) -> Any:
        damage(place if place.is_dir() else place.parent)
        return verify(prepared, place, *rest)

    return damaged


class Chosen(dict[str, Callable[[Path], object]]):
    """The damage that the environment of the fork names."""

    def __call__(self, place: Path) -> None:
        self[os.environ[DAMAGE]](place)


if __name__ == "__main__":
    import nemo_minitron.nemo.huggingface
    import nemo_minitron.workflows.export.run
    from nemo_minitron.workflows.export import verification

    assert nemo_minitron.nemo.huggingface
    verification.of_directory = _first(Chosen(HUGGING_FACE), verification.of_directory)
    verification.of_gguf = _first(Chosen(GGUF), verification.of_gguf)
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]))
