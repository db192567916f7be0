"""Hugging Face directories out of stacked, fused, distributed weights: transformers and safetensors read them back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_minitron.checkpoints.families import FAMILIES
from nemo_minitron.errors import InputError
from nemo_minitron.export import generation
from nemo_minitron.export.safetensors_writer import INDEX, write_shards
from nemo_minitron.export.target import bytes_of, check_target, under_another_name
from nemo_minitron.export.tensors import Weights, parts
from tests.support.stacked_weights import ARCH, of_family, saved, stacked


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_that_transformers_has(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = of_family(family)
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=2,
        hidden_size=24,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        tie_word_embeddings=family == "gemma",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {part.name: part.shape for part in parts(arch)} == expected


# ---- a distributed checkpoint --------------------------------------------------------------------------------


def test_a_box_of_a_tensor(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    reader = saved(tmp_path, {"a": whole, "b": whole.bfloat16()})
    assert torch.equal(reader.read("a", (2, 1, 0), (1, 3, 5)), whole[2:3, 1:4])
    assert reader.read("b", (0, 0, 0), (4, 6, 5)).dtype == torch.bfloat16
    for begin, size in (
        ((4, 0, 0), (1, 6, 5)),
        ((0, 0), (4, 6)),
        ((0, 4, 0), (1, 3, 5)),
        ((-1, 0, 0), (1, 1, 1)),
    ):
        with pytest.raises(InputError, match=r"a has shape \[4, 6, 5\]"):
            reader.read("a", begin, size)
    with pytest.raises(InputError, match="the weights lack c"):
        reader.read("c", (0,), (1,))


def test_fused_rows_are_split_and_padding_is_left_out(tmp_path: Path) -> None:
    tensors = stacked(ARCH, rows=72)
    weights = Weights(ARCH, saved(tmp_path, tensors))
    weights.check()
    qkv = tensors["module.decoder.layers.self_attention.linear_qkv.weight"][1]
    # By groups: two query heads, one key, one value, each of 8 channels.
    heads = [qkv[i * 8 : i * 8 + 8] for i in range(8)]
    for name, chosen in {"q": (0, 1, 4, 5), "k": (2, 6), "v": (3, 7)}.items():
        found = weights.read(f"model.layers.1.self_attn.{name}_proj.weight")
        assert torch.equal(found, torch.cat([heads[i] for i in chosen]))
    fc1 = tensors["module.decoder.layers.mlp.linear_fc1.weight"][0]
    assert torch.equal(weights.read("model.layers.0.mlp.gate_proj.weight"), fc1[:20])
    assert torch.equal(weights.read("model.layers.0.mlp.up_proj.weight"), fc1[20:])
    head = tensors["module.output_layer.weight"]
    assert torch.equal(weights.read("lm_head.weight"), head[:64])


@pytest.mark.parametrize("size", [{"ffn_hidden_size": 19}, {"num_layers": 3}, {"vocab_size": 73}])
def test_weights_of_another_shape_are_refused(tmp_path: Path, size: dict[str, int]) -> None:
    with pytest.raises(InputError, match="by the configuration it has"):
        Weights(ARCH.replace(**size), saved(tmp_path, stacked(ARCH, rows=72))).check()


# ---- safetensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [10**9, 150])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype, largest: int) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(((9,), (4, 7), (3, 1, 5)))
    }
    done: list[int] = []
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    files = write_shards(tmp_path, shapes, dtype, largest, lambda name: [tensors[name]], done.append)
    assert (len(files) > 1) == (largest < 1000 and dtype == torch.float32) == (tmp_path / INDEX).exists()
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype))
    assert done[-1] == sum(t.numel() for t in tensors.values()) * dtype.itemsize
    if (tmp_path / INDEX).exists():
        index = json.loads((tmp_path / INDEX).read_text())
        assert {tmp_path / name for name in index["weight_map"].values()} == set(files)


# ---- what ends a text ----------------------------------------------------------------------------------------


class Ids:
    """A tokenizer's ids."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None


def written(directory: Path, **files: dict[str, Any]) -> Path:
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return directory


def test_the_source_s_stop_tokens_and_sampling_are_kept(tmp_path: Path) -> None:
    written(
        tmp_path,
        generation_config={
            "eos_token_id": [0, 5, 9],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "1",
        },
        config={"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 4},
    )
    found = generation.gathered(tmp_path)
    assert found == {
        "eos_token_id": [0, 5, 9],
        "temperature": 0.6,
        "top_p": 0.9,
        "pad_token_id": 1,
        "bos_token_id": 4,
    }
    generation.write(found, tmp_path)
    assert generation.carried(tmp_path) == found
    assert generation.for_export(found, Ids, 5, 64) == found
    assert generation.for_export(found, Ids, 7, 64)["eos_token_id"] == [0, 5, 9, 7]


def test_the_tokenizer_s_ids_stand_in(tmp_path: Path) -> None:
    assert generation.gathered(tmp_path) == {}
    assert generation.for_export({}, Ids, None, 64) == {"bos_token_id": 1, "eos_token_id": 2}
    assert generation.for_export({}, Ids, 3, 64)["eos_token_id"] == [2, 3]


def test_only_plain_settings_are_carried(tmp_path: Path) -> None:
    written(
        tmp_path,
        generation_config={"cache_config": {"a": 1}, "x": ["code"], "do_sample": True, "eos_token_id": 3},
    )
    assert generation.gathered(tmp_path) == {"do_sample": True, "eos_token_id": 3}


@pytest.mark.parametrize("value", ["two", -1, [1, "x"], 1.5, True, {"a": 1}])
def test_an_id_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    written(tmp_path, config={"eos_token_id": value})
    with pytest.raises(InputError, match="eos_token_id=.* must be a token id"):
        generation.gathered(tmp_path)


def test_an_id_without_a_row_is_refused() -> None:
    with pytest.raises(InputError, match="eos_token_id=64: the model's vocabulary has 64 rows"):
        generation.for_export({"eos_token_id": [3, 64]}, Ids, None, 64)


# ---- where it goes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("4096", 4096), (" 1KB ", 1000)]
)
def test_a_size(size: str, count: int) -> None:
    assert bytes_of("export.shard_size", size) == count


@pytest.mark.parametrize("size", ["", "GB", "0", "-1", "5.5GB", "5GiB", "five", "1" * 40, "٣GB"])
def test_a_size_that_is_none(size: str) -> None:
    with pytest.raises(InputError, match="export.shard_size"):
        bytes_of("export.shard_size", size)


def test_a_target_is_free_and_outside_the_source(tmp_path: Path) -> None:
    source = tmp_path / "run"
    (source / "checkpoint").mkdir(parents=True)
    new = tmp_path / "new"
    assert check_target(new, source, size=1, overwrite=False) == new
    for to, words in (
        (source, "inside the source"),
        (source / "checkpoint" / "x", "inside the source"),
        (tmp_path, "holds the source"),
    ):
        with pytest.raises(InputError, match=words):
            check_target(to, source, size=1, overwrite=True)
    new.mkdir()
    with pytest.raises(InputError, match="overwrite=true"):
        check_target(new, source, size=1, overwrite=False)
    assert check_target(new, source, size=1, overwrite=True) == new
    with pytest.raises(InputError, match="GiB are free on its disk"):
        check_target(tmp_path / "large", source, size=2**60, overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no directory"):
        check_target(tmp_path / "file" / "x", source, size=1, overwrite=False)
    for to, words in (
        (tmp_path / ("x" * 252), "File name too long"),  # with what is added while it is written
        (tmp_path / ("x" * 300) / "y", "File name too long"),
        ("a\0b", "null byte"),
        ("~nobody-of-that-name/x", "home directory"),
    ):
        with pytest.raises(InputError, match=rf"to=.*is no place to write at \(.*{words}"):
            check_target(to, source, size=1, overwrite=False)
    # It has no byte free either, but that is not the cause.
    with pytest.raises(InputError, match=r"to=/proc/x: nothing can be made in /proc \(No such file"):
        check_target("/proc/x", source, size=1, overwrite=False)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", new, source]


def _fail_halfway(target: Path) -> None:
    with under_another_name(target) as place:
        place.mkdir()
        (place / "a").write_text("second")
        raise OSError


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with under_another_name(target) as place:
        place.mkdir()
        (place / "a").write_text("first")
    with pytest.raises(OSError):
        _fail_halfway(target)
    assert (target / "a").read_text() == "first"
    with under_another_name(target) as place:
        place.write_text("a file now")
    assert target.read_text() == "a file now"
    assert list(tmp_path.iterdir()) == [target]
