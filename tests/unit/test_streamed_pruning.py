"""Pruning from file to file: weights of every family as plain indexing cuts them, resumed, checked, refused."""

import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.checkpoints.tensor_files import TensorFiles
from nemo_minitron.config.recipes import CacheTeacherRecipe, PruneRecipe, parse
from nemo_minitron.errors import FailedRun, InputError
from nemo_minitron.export.huggingface_reader import HuggingFaceReader
from nemo_minitron.export.safetensors_writer import INDEX
from nemo_minitron.pruning import PrunePlan, make_plan, resolve_target
from nemo_minitron.pruning.streamed import PrunedWeights
from nemo_minitron.workflows import preflight
from nemo_minitron.workflows.cache_teacher import check as cache_teacher
from nemo_minitron.workflows.prune import artifacts, check, run, streamed
from tests.support import hf_families
from tests.support.hf_families import CONFIGS, cut, make_model

SIZES = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_query_groups": 2,
    "num_attention_heads": 2,
}
RANDOM = {**SIZES, "importance": "random", "seed": 3}


def asked(source: Path, run_dir: Path, **more: Any) -> PruneRecipe:
    settings = {
        "source": str(source),
        "run_dir": str(run_dir),
        "stream": True,
        "data": {"cache_dir": str(run_dir / "cache")},
        "prune": RANDOM,
        **more,
    }
    return parse(PruneRecipe, OmegaConf.create(settings))


def pruned(source: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    """As `recipes/prune.py` does it, once the run directory is there."""
    r = asked(source, run_dir, **more)
    prepared = check.check(r)
    run_dir.mkdir(exist_ok=True)
    return run.run(r, prepared, run_dir)


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.fixture(scope="module", params=[*CONFIGS, "llama"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_families.CONFIGS, "llama", {"model_type": "llama"})
        return directory, make_model(directory, request.param)


def test_the_student_is_what_indexing_makes_of_it(family: tuple[Path, Any], tmp_path: Path) -> None:
    """Every axis and the depth at once; transformers loads what is written, and finds every weight."""
    from transformers import AutoModelForCausalLM

    source, model = family
    result = pruned(source, tmp_path / "run")
    plan = PrunePlan.load(tmp_path / "run" / "plan.json")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    expected = cut(model, plan)
    weights = dict(student.named_parameters())
    assert weights.keys() == dict(expected.named_parameters()).keys()
    for name, weight in expected.named_parameters():
        assert torch.equal(weights[name], weight), name
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (24, 2, plan.source.kv_channels)
    assert result["params_after"] == student.num_parameters() == plan.target.parameters()
    assert find_source(tmp_path / "run" / "checkpoint").architecture == plan.target
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "plan.json"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 in three files, norms in float32."""
    directory = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_families.CONFIGS, "llama", {"model_type": "llama"})
        make_model(directory, "llama").bfloat16().save_pretrained(directory, max_shard_size="40KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    for file in directory.glob("*.safetensors"):
        tensors = {n: t.float() if "norm" in n else t for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def all_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def test_files_of_the_size_asked_for_in_the_source_s_dtype(llama: Path, tmp_path: Path) -> None:
    whole = pruned(llama, tmp_path / "whole")
    parts = pruned(llama, tmp_path / "parts", shard_size="6KB")
    assert (whole["weight_files"], parts["weight_files"]) == (1, len(all_files(tmp_path / "parts")))
    assert parts["weight_files"] > 3
    one, many = (all_of(tmp_path / run / "checkpoint") for run in ("whole", "parts"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert {t.dtype for t in one.values()} == {torch.bfloat16}
    wide = pruned(llama, tmp_path / "wide", trainer={"checkpoint_dtype": "float32"})
    assert wide["weight_bytes"] > 1.5 * whole["weight_bytes"]
    (file,) = all_files(tmp_path / "wide")
    assert all(torch.equal(t.bfloat16(), one[n]) for n, t in load_file(file).items())


def all_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoint").glob("*.safetensors"))


def test_kept_heads_take_in_pruned_ones(llama: Path) -> None:
    """q becomes 2 q - those of the pruned head, computed in float32 (arXiv 2407.14679, section 2.2)."""
    arch = find_source(llama).architecture
    target = resolve_target(arch, {"num_attention_heads": 4, "hidden_size": 24})
    plan = make_plan(arch, target, importance="random", seed=1, source_sha256="", head_residual=True)
    assert plan.head_residual is not None
    tensors = TensorFiles(llama, arch, "source")
    weights = PrunedWeights(plan, tensors.read)
    for layer in range(arch.num_layers):
        q = tensors.read(f"model.layers.{layer}.self_attn.q_proj.weight").float().view(8, 8, 40)
        for kept, gone in plan.head_residual[layer]:
            q[kept] = (
                2 * q[kept]
                - tensors.read(f"model.layers.{layer}.self_attn.q_proj.weight").float().view(8, 8, 40)[gone]
            )
        heads, channels = plan.kept.num_attention_heads, plan.kept.hidden_size
        assert heads is not None
        expected = q[heads[layer]][..., channels].flatten(0, 1).bfloat16()
        (found,) = weights.blocks(f"model.layers.{layer}.self_attn.q_proj.weight")
        assert torch.equal(found, expected)


def test_blocks_of_a_tensor_follow_each_other(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.pruning import streamed as blockwise

    arch = find_source(llama).architecture
    plan = make_plan(arch, resolve_target(arch, SIZES), importance="random", source_sha256="")
    weights = PrunedWeights(plan, TensorFiles(llama, arch, "source").read)
    whole = {name: list(weights.blocks(name)) for name in weights.parts}
    assert all(len(blocks) == 1 for blocks in whole.values())
    monkeypatch.setattr(blockwise, "_BLOCK_BYTES", 200)
    for name, (tensor,) in whole.items():
        blocks = list(weights.blocks(name))
        assert len(blocks) > 3 or tensor.dim() == 1
        assert torch.equal(torch.cat(blocks), tensor)


def test_the_next_layer_is_fetched_while_one_is_used(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, by = find_source(llama).architecture, dict[str, str]()
    read = TensorFiles.read

    def reading(self: TensorFiles, name: str) -> Any:
        by[name] = threading.current_thread().name
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "read", reading)
    reader = HuggingFaceReader(arch, TensorFiles(llama, arch, "source"))
    key, names = (
        "module.decoder.layers.mlp.linear_fc2.weight",
        [f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1, 2)],
    )
    size = (1, arch.hidden_size, arch.ffn_hidden_size)
    for number in (0, 1):
        found = reader.read(key, (number, 0, 0), size)
        assert torch.equal(found[0], all_of(llama)[names[number]])
        assert reader._coming is not None
        assert reader._coming[0] == number + 1
        reader._coming[1].result(60)  # without being asked for
        assert by[names[number + 1]] != threading.current_thread().name
    assert by[names[0]] == threading.current_thread().name


# ---- killed and typed again -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as a signal does: nothing is tidied up."""


def interrupted(source: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, at: str, **more: Any) -> None:
    """Ends a run while it reads a tensor."""
    read = TensorFiles.read

    def reading(self: TensorFiles, name: str) -> Any:
        if name == at:
            raise Killed
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFiles, "read", reading)
        with pytest.raises(Killed):
            pruned(source, run_dir, **more)


def test_it_goes_on_at_the_file_it_was_in(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, small = tmp_path / "run", {"shard_size": "6KB"}
    straight = pruned(llama, tmp_path / "straight", **small)
    interrupted(llama, run_dir, monkeypatch, "model.norm.weight", **small)
    unfinished = run_dir / ".checkpoint.tmp"
    there = {file: file.stat().st_mtime_ns for file in unfinished.glob("*.safetensors")}
    assert 1 < len(there) < straight["weight_files"]
    assert list(unfinished.glob(".*.part"))
    result = pruned(llama, run_dir, **small)
    assert result["weight_files_kept"] == len(there)
    final = run_dir / "checkpoint"
    assert {final / file.name: at for file, at in there.items()}.items() <= {
        file: file.stat().st_mtime_ns for file in final.iterdir()
    }.items()
    assert files_of(final) == files_of(tmp_path / "straight" / "checkpoint")
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint", "plan.json"]


def test_what_another_command_began_is_not_gone_on_with(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, small = tmp_path / "run", {"shard_size": "6KB"}
    interrupted(llama, run_dir, monkeypatch, "model.norm.weight", **small)
    other = {**small, "prune": {**RANDOM, "seed": 4}}
    assert pruned(llama, run_dir, **other)["weight_files_kept"] == 0
    assert pruned(llama, tmp_path / "straight", **other)["weight_files_kept"] == 0
    assert files_of(run_dir / "checkpoint") == files_of(tmp_path / "straight" / "checkpoint")


def _state_of(prepared: Any) -> str:
    return streamed._state(prepared, prepared.plan)


def test_a_run_that_was_killed_before_its_result_writes_nothing_anew(llama: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    pruned(llama, run_dir)
    before = [file.stat().st_mtime_ns for file in all_files(run_dir)]
    state = _state_of(check.check(asked(llama, run_dir)))
    (run_dir / artifacts.MARK).write_text(state)
    assert pruned(llama, run_dir)["weight_files_kept"] == 1
    assert [file.stat().st_mtime_ns for file in all_files(run_dir)] == before


def test_what_was_written_is_read_before_it_has_its_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = streamed._write

    def damaged(prepared: Any, plan: Any, place: Path) -> Any:
        done = write(prepared, plan, place)
        index = json.loads((place / INDEX).read_text())
        index["weight_map"].pop("model.norm.weight")
        (place / INDEX).write_text(json.dumps(index))
        (place / index["weight_map"]["model.embed_tokens.weight"]).write_bytes(b"")
        return done

    monkeypatch.setattr(streamed, "_write", damaged)
    with pytest.raises(FailedRun, match="what was written cannot be read: .*half-written"):
        pruned(llama, tmp_path / "run", shard_size="6KB")
    assert not (tmp_path / "run" / "checkpoint").exists()


# ---- refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a task without each layer": (
        {"prune": {"num_layers": 2, "layer_metric": "task"}},
        r"^prune.layer_metric=task: with stream=true must be one of block_influence, angular_distance, lm_loss",
    ),
    "a block": (
        {"prune": {"num_layers": 2, "contiguous": True}},
        r"^prune.contiguous=true: with stream=true",
    ),
    "steps": ({"prune": {"hidden_size": 24, "iterations": 2}}, r"^prune.iterations=2: with stream=true"),
    "task": ({"prune": {**RANDOM, "task_file": "t.jsonl"}}, r"^prune.task_file=t.jsonl: needs the model"),
    "controls": ({"prune": {**RANDOM, "control_seeds": 2}}, r"^prune.control_seeds=2: needs the model"),
    "tokenizer": ({"data": {"tokenizer": "x"}}, r"^data.tokenizer=x: with stream=true"),
    "shards": ({"shard_size": "many"}, r"^shard_size=many: must be a number of bytes"),
    "no scores": ({"prune": {**SIZES, "scores": "none.safetensors"}}, r"^prune.scores: none.safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_streamed_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    settings, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        check.check(asked(llama, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def refused(source: Path, run_dir: Path, says: str, **more: Any) -> None:
    """By pruning and by caching, before anything is prepared."""
    with pytest.raises(InputError, match=says.format(key="source")):
        check.check(asked(source, run_dir, **more))
    settings = {
        "teacher": str(source),
        "run_dir": str(run_dir),
        "stream": True,
        "distill": {"max_steps": 1, "global_batch_size": 8},
        **more,
    }
    with pytest.raises(InputError, match=says.format(key="teacher")):
        cache_teacher.check(parse(CacheTeacherRecipe, OmegaConf.create(settings)))
    assert not run_dir.exists()


def test_a_layout_of_ranks_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_NPROC", "2")
    says = "^stream=true: works in one process, but the layout has 2 ranks"
    refused(llama, tmp_path / "run", says, trainer={"tensor_model_parallel_size": 2})


def test_sources_of_other_forms_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    says = "^{key}=.*: stream=true reads a Hugging Face directory, this is a GGUF"
    refused(file, tmp_path / "run", says)


def test_two_weights_that_should_be_one(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "run", "^{key}=.*: .* lm_head.weight differs from model.embed_tokens.weight")


def test_a_disk_that_is_too_small_is_refused_with_the_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, 67_000_000))
    with pytest.raises(InputError) as refused:
        check.check(asked(llama, tmp_path / "run"))
    arch = find_source(llama).architecture
    size = resolve_target(arch, SIZES).parameters() * 2
    assert str(refused.value) == (
        f"run_dir={tmp_path}/run: its disk has room for 67,000,000 bytes, needed are {size + 67_108_864:,}: "
        f"the student {size:,}, files beside it 67,108,864"
    )


def test_listed_layers_need_no_scores(llama: Path, tmp_path: Path) -> None:
    result = pruned(llama, tmp_path / "run", prune={"drop_layers": [1, 2]})
    source, student = all_of(llama), all_of(tmp_path / "run" / "checkpoint")
    assert result["kept"] == {"num_layers": [2, 4]}
    for name, tensor in student.items():
        assert torch.equal(tensor, source[name.replace("layers.1.", "layers.3.")].bfloat16())


def test_several_random_steps_are_one_cut(llama: Path, tmp_path: Path) -> None:
    prune = {"hidden_size": 24, "importance": "random", "iterations": 2}
    pruned(llama, tmp_path / "run", prune=prune)
    plan = PrunePlan.load(tmp_path / "run" / "plan.json")
    assert plan.scores["iterations"] == 2
    found = all_of(tmp_path / "run" / "checkpoint")["model.embed_tokens.weight"]
    assert torch.equal(found, all_of(llama)["model.embed_tokens.weight"][:, plan.kept.hidden_size])
