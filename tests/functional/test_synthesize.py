"""recipes/synthesize.py and what recipes/distill.py learns from its text. transformers' model is the reference."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron.config.synthesize import SynthesizeConfig
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.synthesis.store import Written
from nemo_minitron.workflows.synthesize import run as synthesize
from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import SEQ_LENGTH, Commands, tree

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
SAMPLES, BATCH, NEW, OPENING = 20, 8, 24, 8
LAYOUTS = {
    "tp2": (2, ["tensor_model_parallel_size=2"]),
    "pp2": (2, ["pipeline_model_parallel_size=2"]),
    "dp2": (2, ["data_parallel_size=2", "global_batch_size=16"]),
}


@dataclass(frozen=True)
class Text:
    """A finished run."""

    run_dir: Path
    result: dict[str, Any]

    @property
    def samples(self) -> list[dict[str, Any]]:
        files = sorted((self.run_dir / "samples").glob("batch-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "text" / "train.jsonl").read_text().splitlines()]


def overrides(commands: Commands, teacher: Path, run_dir: Path) -> list[str]:
    return [
        *commands.data(),
        f"teacher={teacher}",
        f"run_dir={run_dir}",
        f"synthesize.samples={SAMPLES}",
        f"synthesize.batch_size={BATCH}",
        f"synthesize.max_new_tokens={NEW}",
        f"synthesize.opening_tokens={OPENING}",
        "synthesize.min_new_tokens=4",
    ]


def write(commands: Commands, teacher: Path, name: str, *more: str, nproc: int | None = None) -> Text:
    run_dir = commands.home / f"written-{name}"
    made = [*overrides(commands, teacher, run_dir), *more]
    return Text(run_dir, commands.run("synthesize", *made, nproc=nproc).result())


@pytest.fixture(scope="module")
def written(commands: Commands, teacher: Teacher) -> Text:
    return write(commands, teacher.huggingface, "alone")


def reference(teacher: Teacher) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(teacher.huggingface), AutoTokenizer.from_pretrained(
        teacher.huggingface
    )


@torch.no_grad()
def nats_of(model: Any, sample: dict[str, Any]) -> float:
    ids = torch.tensor([sample["prompt"] + sample["new"]])
    logits = model(ids).logits[0, len(sample["prompt"]) - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(sample["prompt"]) :], reduction="sum"))


def test_the_teacher_wrote_what_it_says(written: Text, teacher: Teacher) -> None:
    """Each loss that was measured while writing, with a key-value cache, is what one plain pass gives."""
    model, tokenizer = reference(teacher)
    assert [sample["index"] for sample in written.samples] == list(range(SAMPLES))
    for sample in written.samples:
        assert len(sample["prompt"]) == 1 + OPENING
        assert tokenizer.eos_token_id not in sample["new"]
        assert sample["ended"] == (len(sample["new"]) < NEW)
        if sample["new"]:
            assert math.isclose(sample["nats"], nats_of(model, sample), rel_tol=1e-3)
    assert len({tuple(sample["new"]) for sample in written.samples}) > SAMPLES / 2


def test_the_text_and_the_report_follow_from_the_samples(written: Text, teacher: Teacher) -> None:
    _, tokenizer = reference(teacher)
    samples, result = {s["index"]: s for s in written.samples}, written.result
    kept = [samples[row["index"]] for row in written.rows]
    assert 0 < len(kept) == result["samples_kept"] <= SAMPLES == result["samples_written"]
    assert sum(v for k, v in result.items() if k.startswith("dropped_")) == SAMPLES - len(kept)
    for row, sample in zip(written.rows, kept, strict=True):
        text = tokenizer.decode(sample["prompt"] + sample["new"], skip_special_tokens=True)
        assert row["text"] == (text if sample["ended"] else text.rstrip("\ufffd"))
    tokens = sum(len(sample["new"]) for sample in kept)
    assert result["tokens_kept"] == tokens
    assert math.isclose(result["lm_loss_nats_teacher"], sum(s["nats"] for s in kept) / tokens, rel_tol=1e-9)
    report = json.loads((written.run_dir / "report.json").read_text())
    assert report["excerpts"][0]["index"] in samples
    assert "| samples_kept |" in (written.run_dir / "report.md").read_text()


def test_other_filters_on_the_same_samples(commands: Commands, teacher: Teacher, written: Text) -> None:
    """Nothing is written anew, and the samples stay."""
    run_dir = commands.home / "written-filtered"
    shutil.copytree(written.run_dir, run_dir)
    made = [*overrides(commands, teacher.huggingface, run_dir), "overwrite=true"]
    whole = Text(run_dir, commands.run("synthesize", *made, f"synthesize.min_new_tokens={NEW}").result())
    assert whole.result["tokens_written_now"] == 0
    assert whole.samples == written.samples
    assert whole.rows == [row for row in written.rows if not row["ended"]]


def test_filters_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    sample = Written(0, prompt=[5], new=[6, 7], ended=True, nats=1.0)
    store = SimpleNamespace(read=lambda: iter([sample]), directory="SAMPLES")
    prepared: Any = SimpleNamespace(tokenizer=load_tokenizer(str(DEMO)), store=store)
    recipe: Any = SimpleNamespace(synthesize=SynthesizeConfig(min_new_tokens=4, max_new_tokens=4))
    with pytest.raises(InputError, match=r"nothing is left of 1 samples \(1 too_short\); SAMPLES keeps them"):
        synthesize._judge(recipe, prepared, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line_before_any_work(
    commands: Commands, teacher: Teacher, written: Text, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "def f"}\n{"prompt": 3}\n')
    (tmp_path / "long.txt").write_text("short\n" + "a long prompt " * 30 + "\n")
    cases = {
        "synthesize.backend=onnx": ["onnx", "megatron, huggingface, vllm"],
        "synthesize.backend=vllm": ["vllm is not installed"],
        f"synthesize.prompts={tmp_path / 'none.txt'}": ["none.txt", "cannot be read"],
        f"synthesize.prompts={tmp_path / 'bad.jsonl'}": ["bad.jsonl, line 2", "'prompt' is a string"],
        f"synthesize.prompts={tmp_path / 'long.txt'}": ["long.txt, line 2", f"context of {SEQ_LENGTH}"],
        f"synthesize.max_new_tokens={SEQ_LENGTH}": [
            f"max_new_tokens={SEQ_LENGTH}",
            f"context of {SEQ_LENGTH}",
        ],
        f"teacher={tmp_path / 'nowhere'}": ["teacher=", "no such directory"],
        f"teacher={tmp_path}": ["no checkpoint here"],
    }
    usual = {"recipe": "synthesize", "env": {}}
    asked = [
        {**usual, "overrides": [*overrides(commands, teacher.huggingface, tmp_path / "run"), override]}
        for override in cases
    ]
    # Samples of other settings, and a result that is there already.
    started = commands.home / "written-started"
    shutil.copytree(written.run_dir, started)
    (started / "result.json").unlink()
    other = "synthesize.temperature=0.5"
    asked += [
        {**usual, "overrides": [*overrides(commands, teacher.huggingface, place), other]}
        for place in (started, written.run_dir)
    ]
    cases |= {"started": ["temperature 1.0, now 0.5", "overwrite=true"], "done": ["already holds a result"]}
    distill = [*commands.data(), f"student={teacher.run_dir}", f"run_dir={tmp_path / 'run'}", "distill=sdg"]
    asked += [
        {"recipe": "distill", "env": {}, "overrides": [*distill, *more]}
        for more in ([], [f"sdg={started}"], [f"sdg={written.run_dir}", "distill.sdg_weight=2.0"])
    ]
    cases |= {"no sdg": ["needs sdg=RUN"], "unfinished": ["did not finish"], "weight": ["sdg_weight=2.0"]}
    for answer, says in zip(commands.ask(asked), cases.values(), strict=True):
        assert answer["code"] == 2, answer
        (line,) = answer["err"].splitlines()
        for part in ("error: ", *says):
            assert part in line
        assert not answer["nemo"]
    assert tree(tmp_path / "run") == {}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_file(commands: Commands, teacher: Teacher, written: Text) -> None:
    run_dir = commands.home / "written-killed"
    made = overrides(commands, teacher.huggingface, run_dir)
    first = run_dir / "samples" / "batch-000000.jsonl"
    commands.killed(
        "synthesize", *made, log=commands.home / "written-killed.log", when=lambda _: first.exists()
    )
    assert not (run_dir / "result.json").exists()
    # One batch only, wherever the kill fell: the others are written by another process than the first.
    for later in (run_dir / "samples").glob("batch-*[1-9].jsonl"):
        later.unlink()
    run = Text(run_dir, commands.run("synthesize", *made).result())
    assert run.result["tokens_written_now"] < run.result["tokens_written"]
    for name in ("text/train.jsonl", "samples/batch-000002.jsonl", "report.json"):
        assert (run_dir / name).read_bytes() == (written.run_dir / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_writes_the_same_text(
    commands: Commands, teacher: Teacher, written: Text, name: str
) -> None:
    count, sizes = LAYOUTS[name]
    made = [f"trainer.{size}" for size in sizes]
    run = write(commands, teacher.huggingface, name, *made, nproc=count)
    assert run.result["ranks"] == count
    assert run.rows == written.rows
    assert run.result["tokens_written_now"] == written.result["tokens_written_now"]


@pytest.mark.slow
def test_backends_agree_where_nothing_is_drawn(commands: Commands, teacher: Teacher) -> None:
    """Greedy, from prompts of several lengths, from a NeMo 2 directory that the other backend has exported."""
    prompts = commands.home / "prompts.txt"
    prompts.write_text("import email\ndef f(self, x):\n    return\nclass\n")
    greedy = ["synthesize.top_k=1", "synthesize.max_repetition=1", "synthesize.near_duplicate_jaccard=1"]
    own = [f"synthesize.prompts={prompts}", "synthesize.samples=4", *greedy]
    runs = [
        write(commands, teacher.run_dir, backend, *own, f"synthesize.backend={backend}")
        for backend in ("megatron", "huggingface")
    ]
    first, second = (run.samples for run in runs)
    assert [s["new"] for s in first] == [s["new"] for s in second]
    assert [s["ended"] for s in first] == [s["ended"] for s in second]
    for ours, theirs in zip(first, second, strict=True):
        assert math.isclose(ours["nats"], theirs["nats"], rel_tol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sdg", "sdg_kd", "sdg_mixed"])
def test_a_student_learns_from_the_text(
    commands: Commands, teacher: Teacher, pruned: Pruned, written: Text, preset: str
) -> None:
    run_dir = commands.home / f"distilled-{preset}"
    ended = commands.run(
        "distill",
        f"distill={preset}",
        *commands.data(),
        f"student={pruned.run_dir}",
        f"teacher={teacher.run_dir}",
        f"sdg={written.run_dir}",
        f"run_dir={run_dir}",
        "distill.max_steps=8",
        "distill.optim.warmup_steps=1",
        "distill.limit_val_batches=2",
    )
    result = ended.result()
    assert result["sdg_weight"] == (0.5 if preset == "sdg_mixed" else 1.0)
    # The held-out text is the corpus's own.
    assert math.isclose(result["lm_loss_nats_before"], pruned.result["lm_loss_nats_after"], rel_tol=1e-6)
    assert result["lm_loss_nats_after"] < result["lm_loss_nats_before"]
    assert (result["kl_nats_after"] is None) == (preset == "sdg")
