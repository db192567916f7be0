"""What a path holds: every file of a Hugging Face directory that lies about itself, and what is no checkpoint at all,
gets its own line; what only looks odd is taken. No model is loaded here."""

import hashlib
import json
import os
import re
import shutil
import socket
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.errors import InputError
from tests.support.hf_families import make_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "hf"
    make_model(directory, "qwen2-tied")
    return directory


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "hf")
    return tmp_path / "hf"


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file({name: w.contiguous() for name, w in weights.items()}, directory / "model.safetensors")


def in_shards(directory: Path) -> dict[str, str]:
    """Two shards and their index, as transformers writes them; the map of names."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {name: w for i, (name, w) in enumerate(sorted(weights.items())) if i % 2 == number - 1}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refused(path: Path | str, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        find_source(path)
    message = str(error.value)
    assert message.startswith(f"source={path}: ")
    assert "\n" not in message
    assert all(part in message for part in parts), message


# ---- taken -------------------------------------------------------------------------------------------------


def test_only_files_of_the_index_belong_to_the_model(source: Path) -> None:
    """Mistral's consolidated.safetensors and Meta's original/ change neither identity nor size."""
    in_shards(source)
    before = find_source(source).sha256()
    files = [source / "config.json", *sorted(source.glob("model-*.safetensors"))]
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    assert before == total.hexdigest()
    shutil.copy(source / "model-00001-of-00002.safetensors", source / "consolidated.safetensors")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"x")
    (source / "pytorch_model.bin").write_bytes(b"x")
    assert find_source(source).sha256() == before


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({}, "float32"),
        ({"": torch.float16}, "float16"),
        ({"": torch.bfloat16}, "bfloat16"),
        ({"": torch.bfloat16, "norm": torch.float32}, "bfloat16"),
    ],
    ids=str,
)
def test_the_dtype_is_that_of_the_weights(
    source: Path, dtypes: dict[str, torch.dtype], expected: str
) -> None:
    """Whatever config.json says under which name."""

    def cast(weights: dict[str, torch.Tensor]) -> None:
        for part, dtype in dtypes.items():
            weights |= {name: w.to(dtype) for name, w in weights.items() if part in name}

    change_weights(source, cast)
    change_config(source, torch_dtype=None, dtype="bfloat16")
    assert find_source(source).dtype == expected


def test_tied_weights_told_in_any_way(source: Path) -> None:
    """Only the embedding, both, only the output layer; untied is another architecture and needs both."""
    assert find_source(source).architecture.share_embeddings_and_output_weights
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(source, lambda w: w.update({"lm_head.weight": embedding.clone()}))
    assert find_source(source).architecture.share_embeddings_and_output_weights
    change_config(source, tie_word_embeddings=False)
    assert not find_source(source).architecture.share_embeddings_and_output_weights
    change_weights(source, lambda w: w.__delitem__("lm_head.weight"))
    refused(source, "lack lm_head.weight", "tie_word_embeddings is not true")
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]  # Qwen2's default: untied
    (source / "config.json").write_text(json.dumps(config))
    refused(source, "lack lm_head.weight")
    change_config(source, tie_word_embeddings=True)

    def only_the_head(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    change_weights(source, only_the_head)
    assert find_source(source).architecture.share_embeddings_and_output_weights


def test_keys_that_are_not_read_are_said_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(source, router_scale=2.0)
    find_source(source)
    find_source(source)
    assert capsys.readouterr().err == f"source={source}: config.json: not read: router_scale\n"


# ---- refused: weights --------------------------------------------------------------------------------------


def test_an_index_that_names_what_no_shard_has(source: Path) -> None:
    weight_map = in_shards(source)
    name = "model.layers.0.mlp.up_proj.weight"
    other = next(file for file in weight_map.values() if file != weight_map[name])
    write_index(source, weight_map | {"lm_head.weight": other})
    refused(source, f"{other} lacks 'lm_head.weight', which model.safetensors.index.json says it holds")
    write_index(source, weight_map | {name: other})
    refused(source, f"{other} lacks '{name}'")
    write_index(source, weight_map)
    file = weight_map[name]
    save_file({**load_file(source / other), name: load_file(source / file)[name]}, source / other)
    refused(source, f"'{name}' is in model-00001-of-00002.safetensors and in model-00002-of-00002")


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.float8_e4m3fn, "'F8_E4M3': quantised weights are not read, only F32, F16, BF16 are"),
        (torch.int8, "'I8': quantised weights are not read, only F32, F16, BF16 are"),
        (torch.float64, "'F64': must be one of F32, F16, BF16; save the model in float32"),
    ],
    ids=str,
)
def test_weights_in_another_dtype(source: Path, dtype: torch.dtype, says: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(source, lambda w: w.update({name: w[name].to(dtype)}))
    refused(source, f"'{name}' has dtype {says}")


def test_scales_beside_the_weights(source: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    change_weights(source, lambda w: w.update({name: torch.ones(1)}))
    refused(source, f"hold a tensor that config.json does not: {name}")


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8", "awq", "gptq", "bitsandbytes"])
def test_a_quantization_config(source: Path, method: str) -> None:
    change_config(source, quantization_config={"quant_method": method, "bits": 4})
    refused(source, f"quantization_config (quant_method '{method}'): quantised weights are not read")


def header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [8, 4]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": "x"},
        {"shape": [1]},
        {"shape": [True]},
        {"dtype": ["F32"]},
        {"dtype": None},
    ],
    ids=str,
)
def test_headers_that_lie(source: Path, entry: dict[str, Any]) -> None:
    header(source / "model.safetensors", lambda entries: entries["model.norm.weight"].update(entry))
    refused(source, "model.safetensors is half-written or damaged")


def test_damaged_and_missing_files(source: Path) -> None:
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    for raw, message in (
        (b"", "is half-written or damaged"),
        (b"\xff" * 64, "is half-written or damaged"),
        (whole[:-1], "is half-written"),
        (whole + b"x", "is half-written"),
        (POINTER.encode(), "is a Git LFS pointer, not the file itself: run `git lfs pull` in"),
    ):
        weights.write_bytes(raw)
        refused(source, f"model.safetensors {message}")
    weights.unlink()
    refused(source, "model.safetensors is missing (only safetensors are read)")
    (source / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    refused(source, "pytorch_model-00001-of-00002.bin is a pickle, which is not loaded: save the model with")
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    (source / "consolidated.safetensors").write_bytes(whole)
    refused(source, "consolidated.safetensors is Mistral's own format")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "directory"])
def test_only_regular_files_are_opened(source: Path, name: str, kind: str, monkeypatch: Any) -> None:
    """To open a fifo without a writer waits for ever."""
    (source / name).unlink()
    if kind == "fifo":
        os.mkfifo(source / name)
    elif kind == "socket":
        monkeypatch.chdir(source)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
    elif kind == "device":
        (source / name).symlink_to("/dev/zero")
    else:
        (source / name).mkdir()
    if (name, kind) == ("tokenizer.json", "directory"):
        return  # the tokenizer's loader says so
    refused(source, "no checkpoint here" if name == "config.json" else f"{name} is not a regular file")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", POINTER, "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"]
)
def test_a_config_that_is_none(source: Path, text: str) -> None:
    (source / "config.json").write_text(text)
    refused(source, "config.json")


# ---- refused: other things ---------------------------------------------------------------------------------


def test_what_is_no_checkpoint_of_a_known_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("meta-llama/Llama-3.2-1B", "huggingface-cli download meta-llama/Llama-3.2-1B --local-dir DIR")
    refused("/meta-llama/Llama-3.2-1B", "no such directory")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", "a file, no directory; legal are a run directory")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "neither a file nor a directory")
    old = tmp_path / "old"
    (old / "model_weights").mkdir(parents=True)
    (old / "model_config.yaml").write_text("x: 1")
    refused(old, "a NeMo 1 checkpoint, which is not read", "convert_*_nemo_to_hf.py")
    with tarfile.open(tmp_path / "model.nemo", "w") as tar:
        tar.add(old, ".")
    refused(tmp_path / "model.nemo", "a NeMo 1 checkpoint, which is not read")
    (tmp_path / "ranks" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "ranks" / "model_config.yaml").write_text("x: 1")
    refused(tmp_path / "ranks", "a NeMo 1 checkpoint")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "a PEFT adapter without its model")
    meta = tmp_path / "meta"
    meta.mkdir()
    for name in ("params.json", "consolidated.00.pth"):
        (meta / name).write_text("{}")
    refused(meta, "in the format of its makers")
    weights = tmp_path / "run" / "step=10-last" / "weights"
    weights.mkdir(parents=True)
    for name in ("metadata.json", "common.pt"):
        (weights / name).write_text("{}")
    refused(weights, f"give the directory above it, {weights.parent}")
    (weights.parent / "context").mkdir()
    refused(tmp_path / "run", "no checkpoint here, but in step=10-last; legal are")
    refused(weights.parent, "half-written or no NeMo 2 checkpoint")
    os.mkfifo(weights / "__0_0.distcp")
    refused(weights.parent, re.escape("__0_0.distcp is not a regular file").replace("\\", ""))
