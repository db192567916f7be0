"""recipes/distill.py: a pruned student learns from its teacher. transformers' models are the reference."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.conftest import Pruned, Teacher
from tests.support import ranks, sessions
from tests.support.commands import ROOT, SEQ_LENGTH, SIZES, VOCAB_SIZE, Commands
from tests.support.kill_trials import unmeasured
from tests.support.tracked import same_as_steps

STEPS = 6
PATIENCE_S = 240
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2-sp": (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
    "pp2": (2, ["pipeline_model_parallel_size=2", "micro_batch_size=2"]),
    "dp2": (2, ["data_parallel_size=2", "micro_batch_size=4"]),
    "tp2-pp2": (4, ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]),
    "accumulated": (1, ["micro_batch_size=2"]),
    "recomputed": (1, ["recompute_granularity=selective"]),
}


@dataclass(frozen=True)
class Run:
    """A finished run: its result and the lines of steps.jsonl."""

    run_dir: Path
    result: dict[str, Any]

    def lines(self, split: str) -> list[dict[str, float]]:
        return lines(self.run_dir, split)


def lines(run_dir: Path, split: str) -> list[dict[str, float]]:
    found = [unmeasured(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    return [line for line in found if line.pop("split") == split]


def overrides(commands: Commands, student: Path, teacher: Path, run_dir: Path) -> list[str]:
    return [
        "+conf=width",
        *commands.data(),
        f"student={student}",
        f"teacher={teacher}",
        f"run_dir={run_dir}",
        f"distill.max_steps={STEPS}",
        "distill.optim.warmup_steps=1",
        "distill.limit_val_batches=2",
    ]


def distil(
    commands: Commands, student: Path, teacher: Path, name: str, *more: str, nproc: int | None = None
) -> Run:
    run_dir = commands.home / f"distilled-{name}"
    made = overrides(commands, student, teacher, run_dir)
    return Run(run_dir, commands.run("distill", *made, *more, nproc=nproc).result())


@pytest.fixture(scope="module")
def distilled(commands: Commands, teacher: Teacher, pruned: Pruned) -> Run:
    return distil(commands, pruned.run_dir, teacher.run_dir, "alone", "logger=tensorboard")


def test_the_student_learns_and_the_result_says_so(distilled: Run, pruned: Pruned, teacher: Teacher) -> None:
    result, (valid,) = distilled.result, distilled.lines("valid")
    assert [line["step"] for line in distilled.lines("train")] == list(range(STEPS))
    assert result["params"] == pruned.result["params_after"]
    assert result["tokens"] == STEPS * 8 * SEQ_LENGTH
    assert math.isclose(result["lm_loss_nats_before"], pruned.result["lm_loss_nats_after"], rel_tol=1e-6)
    assert result["lm_loss_nats_after"] < result["lm_loss_nats_before"]
    assert result["kl_nats_after"] == valid["kl"] < distilled.lines("train")[0]["kl"]


def test_a_step_tells_its_cost_and_tensorboard_hears_of_it(distilled: Run) -> None:
    first = json.loads((distilled.run_dir / "steps.jsonl").read_text().splitlines()[1])
    assert first["tokens_per_s"] == pytest.approx(first["tokens"] / first["seconds"], rel=0.01)
    assert 0 < first["peak_rss_gib"] <= distilled.result["peak_rss_gib"]
    same_as_steps(distilled.run_dir, "kl", "lm_loss", "seconds", "tokens_per_s", "peak_rss_gib")


def test_a_validation_tells_both_losses(distilled: Run) -> None:
    """On the first sequences of those that the result's LM loss is measured on."""
    (valid,) = distilled.lines("valid")
    assert valid["step"] == STEPS - 1
    assert 0 < valid["kl"] == valid["loss"]
    assert math.isclose(valid["lm_loss"], distilled.result["lm_loss_nats_after"], rel_tol=0.05)


def test_the_teacher_s_own_loss_is_told_first(distilled: Run, teacher: Teacher) -> None:
    (line,) = distilled.lines("teacher")
    assert math.isclose(line["lm_loss"], teacher.result["lm_loss_nats"], rel_tol=1e-6)
    first = json.loads((distilled.run_dir / "steps.jsonl").read_text().splitlines()[0])
    assert first["split"] == "teacher"


def test_nothing_of_the_teacher_is_in_the_student(distilled: Run, pruned: Pruned) -> None:
    (state,) = (distilled.run_dir / "nemo" / "checkpoints").glob("*-last")
    sizes = sizes_of(state)
    weights = {name: size for name, size in sizes.items() if not name.startswith("optimizer.")}
    moments = {name: size for name, size in sizes.items() if name.startswith("optimizer.state.exp_avg.")}
    assert sum(weights.values()) == sum(moments.values()) == pruned.result["params_after"]


def test_the_checkpoint_is_the_weights_alone(distilled: Run, pruned: Pruned) -> None:
    """The optimizer stays with the state that a resumed run needs."""
    assert sum(sizes_of(distilled.run_dir / "checkpoint").values()) == pruned.result["params_after"]


def sizes_of(checkpoint: Path) -> dict[str, int]:
    """Elements by name, by torch's own table of contents."""
    from torch.distributed.checkpoint import FileSystemReader

    contents = FileSystemReader(str(checkpoint / "weights")).read_metadata().state_dict_metadata
    return {name: math.prod(e.size) for name, e in contents.items() if hasattr(e, "size")}


def nats(student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Sums over the unmasked tokens of KL(teacher || student) and of the student's cross-entropy, in float64."""
    ours, theirs = (
        model(batch["tokens"]).logits[..., :VOCAB_SIZE].double().log_softmax(-1)
        for model in (student, teacher)
    )
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    cross_entropy = -ours.gather(-1, batch["labels"][..., None])[..., 0]
    return float((kl * batch["loss_mask"]).sum()), float((cross_entropy * batch["loss_mask"]).sum())


def test_a_nemo_script_s_first_step_is_what_transformers_computes(
    commands: Commands, teacher: Teacher, pruned: Pruned, tmp_path: Path
) -> None:
    """The transform in nl.Trainer(callbacks=...), without a recipe; the batches are those that it trained on."""
    from transformers import LlamaForCausalLM

    train = teacher.corpus(commands.cache) / "train"
    student = pruned.run_dir / "checkpoint"
    script = ROOT / "tests" / "support" / "recorded_distillation.py"
    done = subprocess.run(
        [sys.executable, script, student, teacher.run_dir / "checkpoint", train, tmp_path],
        env=commands.environment(PYTHONPATH=str(ROOT)),
        cwd=commands.home,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    fate = json.loads((tmp_path / "teacher.json").read_text())
    assert fate == {"unchanged": True, "gradients": False, "buffers": False, "shared": False}
    ranks.run_on_ranks(1, sessions.exported, str(student), str(tmp_path / "hf"), timeout=PATIENCE_S)
    models = [LlamaForCausalLM.from_pretrained(path) for path in (tmp_path / "hf", teacher.huggingface)]
    first, second, *_ = torch.load(tmp_path / "batches.pt", weights_only=True)
    assert not torch.equal(first["tokens"], second["tokens"])
    with torch.no_grad():
        found = [nats(*models, batch) for batch in (first, second)]
    tokens = float(first["loss_mask"].sum() + second["loss_mask"].sum())
    kl, cross_entropy = (sum(part) / tokens for part in zip(*found, strict=True))
    step = json.loads((tmp_path / "steps.json").read_text())[0]
    assert kl > 0.01
    assert math.isclose(step["kl"], kl, rel_tol=1e-4)
    assert math.isclose(step["lm_loss"], cross_entropy, rel_tol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_agrees_with_one_process(
    commands: Commands, teacher: Teacher, pruned: Pruned, distilled: Run, name: str
) -> None:
    count, sizes = LAYOUTS[name]
    run = distil(
        commands,
        pruned.run_dir,
        teacher.run_dir,
        name,
        *(f"trainer.{size}" for size in sizes),
        nproc=count if count > 1 else None,
    )
    assert run.result["ranks"] == count
    same_losses(run, distilled)
    if "pp2" in name:
        # The global batch's final states, on the last stage.
        states = 8 * SEQ_LENGTH * SIZES["hidden_size"] * 4
        assert run.result["teacher_states_gib"] == round(states / 2**30, 6)
        assert run.result["teacher_schedule_s"] > 0


def same_losses(run: Run, expected: Run) -> None:
    for split in ("train", "valid"):
        assert len(run.lines(split)) == len(expected.lines(split)) > 0
        for ours, theirs in zip(run.lines(split), expected.lines(split), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert math.isclose(ours[key], theirs[key], rel_tol=1e-3), (split, ours["step"], key)
    for key in ("lm_loss_nats_before", "lm_loss_nats_after"):
        assert math.isclose(run.result[key], expected.result[key], rel_tol=1e-4), key


@pytest.mark.slow
def test_intermediate_states_are_the_same_on_two_stages(commands: Commands, teacher: Teacher) -> None:
    """A student of the teacher's width: first values of a projection would depend on the layout."""
    student = commands.home / "narrow-mlp"
    commands.prune(teacher.huggingface, student, f"prune.hidden_size={SIZES['hidden_size']}").result()
    own = ["distill.intermediate.layers={1: 1, 3: 3}", "distill.intermediate.embedding=true"]
    alone = distil(commands, student, teacher.run_dir, "between", *own)
    stages = "trainer.pipeline_model_parallel_size=2"
    two = distil(commands, student, teacher.run_dir, "between-pp2", *own, stages, nproc=2)
    first = alone.lines("train")[0]
    assert first["intermediate"] > 1e-4
    assert math.isclose(first["alpha"] * first["intermediate"], first["kl"], rel_tol=1e-5)
    same_losses(two, alone)


@pytest.mark.slow
def test_projections_do_not_stay_in_the_student(commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    run = distil(commands, pruned.run_dir, teacher.run_dir, "projected", "distill.intermediate.layers=late")
    assert run.lines("train")[-1]["intermediate"] < run.lines("train")[0]["intermediate"]
    assert run.result["lm_loss_nats_after"] < run.result["lm_loss_nats_before"]


@pytest.mark.slow
def test_a_copy_of_the_teacher_has_nothing_to_learn(commands: Commands, teacher: Teacher) -> None:
    """One step: beyond it Adam makes full steps of what rounding leaves in gradients of zero."""
    run = distil(commands, teacher.run_dir, teacher.run_dir, "copy", "distill.max_steps=1")
    (line,) = run.lines("train")
    assert abs(line["kl"]) < 1e-6
    assert line["lm_loss"] > 1


@pytest.mark.slow
def test_a_killed_distillation_goes_on_with_the_same_losses(
    commands: Commands, teacher: Teacher, pruned: Pruned, distilled: Run
) -> None:
    """Killed between two checkpoints; the data's order, the schedule and the optimizer come back."""
    often = ["distill.val_check_interval=2"]
    straight = distil(commands, pruned.run_dir, teacher.run_dir, "straight", *often)
    run_dir = commands.home / "distilled-killed"
    made = [*overrides(commands, pruned.run_dir, teacher.run_dir, run_dir), *often]
    steps = run_dir / "steps.jsonl"
    commands.killed(
        "distill",
        *made,
        log=commands.home / "distilled-killed.log",
        when=lambda _: steps.exists() and len(lines(run_dir, "train")) >= 3,
    )
    assert not (run_dir / "result.json").exists()
    ended = commands.run("distill", *made)
    run = Run(run_dir, ended.result())
    for split in ("train", "valid"):
        assert run.lines(split) == straight.lines(split), split
    assert run.result["lm_loss_nats_after"] == straight.result["lm_loss_nats_after"]
    # The kept weights cost nothing of what went before: the same steps without interruption or validation.
    assert [line["kl"] for line in run.lines("train")] == [line["kl"] for line in distilled.lines("train")]
