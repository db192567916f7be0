"""recipes/export.py: what plain transformers makes of a pruned student, and what is refused."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.conftest import Pruned, Teacher
from tests.functional.test_student_loads import cut
from tests.support import damaged_exports
from tests.support.commands import VOCAB_SIZE, Commands, Ended


@dataclass(frozen=True)
class Exported:
    """A directory that recipes/export.py wrote."""

    directory: Path
    ended: Ended
    result: dict[str, Any]


@pytest.fixture(scope="module")
def exported(commands: Commands, pruned: Pruned) -> Exported:
    directory = commands.home / "exported"
    settings = [
        "export.shard_size=100KB",
        "license=none",
        "export.verify_tokens=64",
        f"run_dir={commands.home / 'export-run'}",
    ]
    ended = commands.run("export", f"source={pruned.run_dir}", f"to={directory}", *settings)
    return Exported(directory, ended, ended.result())


def loaded(directory: Path) -> Any:
    """Every weight of the files, and no other."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def test_plain_transformers_opens_the_student(teacher: Teacher, pruned: Pruned, exported: Exported) -> None:
    """Against the teacher's own weights, cut by plain indexing."""
    model = loaded(exported.directory)
    expected = cut(teacher.huggingface, json.loads((pruned.run_dir / "plan.json").read_text()))
    tokens = torch.randint(VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((exported.directory / "config.json").read_text())
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]


def test_the_result_says_how_it_was_checked(exported: Exported, pruned: Pruned) -> None:
    result = exported.result
    assert 0 <= result["verify_max_difference"] < 1e-4 * max(1, result["verify_largest_logit"])
    assert result["verify_tokens"] == 64
    assert result["params"] == pruned.result["params_after"]
    files = sorted(exported.directory.glob("*.safetensors"))
    assert len(files) == result["weight_files"] > 1
    assert sum(file.stat().st_size for file in files) == result["weight_bytes"]
    assert result["dtype"] == "float32"
    assert Path(result["exported"]) == exported.directory
    card = (exported.directory / "README.md").read_text()
    assert "pruned by importance" in card
    assert "(importance.png)" in card
    assert (exported.directory / "importance.png").read_bytes() == (
        pruned.run_dir / "importance.png"
    ).read_bytes()
    assert not [path for path in exported.directory.parent.iterdir() if path.name.startswith(".exported")]


def test_the_tokenizer_and_its_ids_come_along(teacher: Teacher, exported: Exported) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    before, after = (
        AutoTokenizer.from_pretrained(path) for path in (teacher.huggingface, exported.directory)
    )
    text = "def f(x):\n    return x  # 12 é"
    assert after.encode(text) == before.encode(text)
    settings = GenerationConfig.from_pretrained(exported.directory)
    assert (settings.eos_token_id, settings.pad_token_id) == (before.eos_token_id, before.pad_token_id)
    assert exported.result["stop_token_ids"] == [before.eos_token_id]


def test_half_precision_of_a_hugging_face_source(
    commands: Commands, teacher: Teacher, tmp_path: Path
) -> None:
    """Ids, sampling and template of the source's author; the template's end marker is a stop token."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(teacher.huggingface, source)
    template = (
        "{%- for m in messages -%}{{ m['role'] + ':' + m['content'] + pad_token }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
    )
    for name, values in {
        "generation_config.json": {"eos_token_id": [0, 5, 9], "temperature": 0.6, "do_sample": True},
        "tokenizer_config.json": {"chat_template": template},
    }.items():
        old = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(old | values))
    settings = [
        "license=mit",
        "export.dtype=bfloat16",
        "export.verify_tokens=64",
        f"run_dir={tmp_path / 'run'}",
    ]
    result = commands.run("export", f"source={source}", f"to={target}", *settings).result()
    assert (result["dtype"], result["stop_token_ids"]) == ("bfloat16", [0, 5, 9, 1])
    assert result["verify_max_difference"] < 1e-4 * max(1, result["verify_largest_logit"])
    generation, config = (
        json.loads((target / f"{n}.json").read_text()) for n in ("generation_config", "config")
    )
    assert (generation["temperature"], generation["do_sample"]) == (0.6, True)
    assert config["eos_token_id"] == generation["eos_token_id"] == [0, 5, 9, 1]
    model, before = loaded(target), loaded(teacher.huggingface)
    assert model.dtype == torch.bfloat16 or torch.equal(
        model.lm_head.weight, before.lm_head.weight.bfloat16()
    )
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), weight.bfloat16().float()), name


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_full_disk_leaves_nothing(format: str, commands: Commands, pruned: Pruned, tmp_path: Path) -> None:
    target, run_dir = tmp_path / "target", tmp_path / "run"
    ended = commands.run(
        "export",
        "license=none",
        f"format={format}",
        f"source={pruned.run_dir}",
        f"to={target}",
        f"run_dir={run_dir}",
        largest_file_bytes=150_000,
    )
    assert ended.code == 1, ended.stderr
    assert list(tmp_path.iterdir()) == [run_dir]
    assert not (run_dir / "result.json").exists()


# ---- refused before any work ---------------------------------------------------------------------------------


def interrupted(home: Path, pruned: Pruned) -> Path:
    bad = home / "bad-export" / "killed"
    shutil.copytree(pruned.run_dir / "checkpoint", bad / "checkpoint")
    return bad


def plain(home: Path, pruned: Pruned) -> Path:
    """A GPTModel of no family."""
    bad = home / "bad-export" / "plain"
    shutil.copytree(pruned.run_dir / "checkpoint", bad)
    settings = bad / "context" / "model.yaml"
    settings.write_text(re.sub(r"llama\.Llama(Model|Config)", r"base.GPT\1", settings.read_text()))
    return bad


def with_ids(home: Path, teacher: Teacher) -> Path:
    bad = home / "bad-export" / "ids"
    shutil.copytree(teacher.huggingface, bad)
    (bad / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCAB_SIZE}))
    return bad


def test_refused(commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    source, home = pruned.run_dir, commands.home
    cases: dict[str, tuple[list[str], list[str]]] = {
        "format": (["format=onnx"], ["format=onnx", "hf", "gguf"]),
        "gguf type": (["format=gguf", "export.quantization=Q4"], ["export.quantization=Q4", "Q8_0"]),
        "gguf file": (["format=gguf", f"to={home}/bad-export/a.gguf"], ["a.gguf", "writes a directory"]),
        "perplexity": (["export.perplexity_tokens=-1"], ["export.perplexity_tokens=-1", "at least 0"]),
        "dtype": (["export.dtype=int8"], ["export.dtype=int8", "bfloat16"]),
        "fp8": (["export.dtype=fp8"], ["export.dtype=fp8", "needs CUDA"]),
        "fp8 gguf": (["export.dtype=fp8", "format=gguf"], ["export.dtype=fp8", "is of format=hf"]),
        "shards": (["export.shard_size=5GiB"], ["export.shard_size=5GiB", "GB"]),
        "tokens": (["export.verify_tokens=1"], ["export.verify_tokens=1", "at least 2"]),
        "no licence": (["license=null"], ["license: nothing in", "says what it is under", "license=none"]),
        "licence": (["license=foo"], ["license=foo", "apache-2.0"]),
        "no derivatives": (["license=cc-by-nd-4.0"], ["license=cc-by-nd-4.0", "forbids changed copies"]),
        "name": (["license=llama3.2", "publish=me/student"], ["publish=me/student", "begins with Llama"]),
        "repository": (["publish=a/b/c"], ["publish=a/b/", "ORG/NAME"]),
        "push": (["push=true"], ["push=true", "publish=ORG/NAME"]),
        "no source": (["source=null"], ["source", "missing"]),
        "inside": ([f"to={source}/checkpoint/hf"], ["inside the source"]),
        "around": ([f"to={teacher.huggingface.parent}"], ["holds the source"]),
        "there": ([f"to={teacher.huggingface}"], ["there already", "overwrite=true"]),
        "below a file": ([f"to={source}/../teacher/result.json/x"], ["no directory"]),
        "killed": ([f"source={interrupted(home, pruned)}"], ["did not finish"]),
        "no family": (
            [f"source={(gpt := plain(home, pruned))}"],
            ["a plain GPTModel", "format=hf has llama"],
        ),
        "no family for llama.cpp": (
            [f"source={gpt}", "format=gguf"],
            ["a plain GPTModel", "format=gguf has"],
        ),
        "an id": ([f"source={with_ids(home, teacher)}"], [f"eos_token_id={VOCAB_SIZE}", "rows"]),
    }
    common = [
        "license=none",
        f"source={source}",
        f"to={home}/bad-export/to",
        f"run_dir={home}/bad-export/run",
    ]
    asked = []
    for overrides, _ in cases.values():
        given = {item.partition("=")[0] for item in overrides}
        kept = [item for item in common if item.partition("=")[0] not in given]
        asked.append({"recipe": "export", "overrides": [*kept, *overrides], "env": {}})
    for name, answer in zip(cases, commands.ask(asked), strict=True):
        assert answer["code"] == 2, (name, answer)
        assert not answer["nemo"], name
        lines = answer["err"].splitlines()
        for part in cases[name][1]:
            assert part in lines[-1], (name, lines)
    assert not (home / "bad-export" / "to").exists()
    assert not (home / "bad-export" / "run" / "result.json").exists()


# ---- damaged before it is verified ---------------------------------------------------------------------------


@pytest.mark.slow
def test_damage_is_found(commands: Commands, pruned: Pruned, tmp_path: Path) -> None:
    """Whatever is wrong with what was written: exit code 1, and nothing of it is left."""
    cases = [("hf", name) for name in damaged_exports.HUGGING_FACE]
    cases += [("gguf", name) for name in damaged_exports.GGUF]
    common = ["license=none", f"source={pruned.run_dir}", "export.verify_tokens=32"]
    asked = []
    for number, (form, name) in enumerate(cases):
        places = [f"to={tmp_path / 'to'}", f"run_dir={tmp_path}/runs/{number}"]
        overrides = [*common, *places, f"format={form}"]
        asked.append({"recipe": "export", "overrides": overrides, "env": {damaged_exports.DAMAGE: name}})
    for case, answer in zip(cases, commands.ask(asked, script="damaged_exports.py"), strict=True):
        assert answer["code"] == 1, (case, answer)
        lines = answer["err"].splitlines()
        assert lines[-1].startswith("error: "), case
        assert any(
            words in lines[-1] for words in ("other logits", "differ in the tensor", "cannot be read")
        ), case
        assert "Traceback" not in answer["err"], case
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert not list(tmp_path.glob("runs/*/result.json"))
