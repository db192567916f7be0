"""Distillation that goes wrong, and under settings that need no recipe's start: in ranks that have NeMo loaded."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.errors import InputError
from tests.functional import test_distill
from tests.functional.conftest import Pruned, Teacher
from tests.functional.test_distill import PATIENCE_S, STEPS, Run, lines
from tests.support import ranks, sessions
from tests.support.commands import Commands


def under(
    commands: Commands,
    student: Path,
    teacher: Path,
    name: str,
    *more: str,
    count: int = 1,
    spoiled_after: int | None = None,
    **sizes: Any,
) -> Run:
    run_dir = commands.home / f"conditions-{name}"
    made = [
        *test_distill.overrides(commands, student, teacher, run_dir),
        f"data.cache_dir={commands.cache}",
        *more,
    ]
    result, *_ = ranks.run_on_ranks(
        count, sessions.distilled_under, made, sizes, spoiled_after, timeout=PATIENCE_S
    )
    return Run(run_dir, result)


@pytest.fixture(scope="module")
def straight(commands: Commands, teacher: Teacher, pruned: Pruned) -> Run:
    return under(commands, pruned.run_dir, teacher.run_dir, "straight")


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "nemo" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("spoiled_after", "said"),
    [
        (3, "step 3, samples 24 to 31 of the training data's order: a gradient is not finite"),
        # These are saved before anything shows what they are.
        (4, "step 3, samples 24 to 31 of the training data's order: after it the validation loss is nan"),
    ],
    ids=["between two checkpoints", "right before one"],
)
def test_weights_that_turn_bad_are_not_what_is_kept(
    commands: Commands, teacher: Teacher, pruned: Pruned, straight: Run, spoiled_after: int, said: str
) -> None:
    name, often = f"spoiled-{spoiled_after}", "distill.val_check_interval=2"
    with pytest.raises(FloatingPointError, match=said):
        under(commands, pruned.run_dir, teacher.run_dir, name, often, spoiled_after=spoiled_after)
    assert kept(commands.home / f"conditions-{name}") == ["step=1-last"]
    # It goes on from there, as if nothing had happened.
    run = under(commands, pruned.run_dir, teacher.run_dir, name, often)
    assert kept(run.run_dir)[-1] == f"step={STEPS - 1}-last"
    losses = [line["kl"] for line in run.lines("train")]
    assert losses == pytest.approx([line["kl"] for line in straight.lines("train")], rel=1e-6)
    assert math.isfinite(run.result["lm_loss_nats_after"])


def test_a_teacher_of_random_weights_is_refused(commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    from safetensors.torch import load_file, save_file

    random = commands.home / "random-teacher"
    shutil.copytree(teacher.huggingface, random)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(w.shape, generator=generator) * 0.02 if w.dim() > 1 else w
        for name, w in load_file(random / "model.safetensors").items()
    }
    save_file(weights, random / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"random-teacher: its LM loss is 6\.\d+ nats .* guessing costs 6\.238"
    ):
        under(commands, pruned.run_dir, random, "random")
    run_dir = commands.home / "conditions-random"
    assert not lines(run_dir, "train")
    assert not (run_dir / "nemo" / "checkpoints").exists()


def test_a_student_that_is_no_child_of_its_teacher_learns_with_its_own_projection(
    commands: Commands, teacher: Teacher, pruned: Pruned
) -> None:
    """The wide one is the student here: wider than its teacher, and not pruned from it."""
    own = ["distill.intermediate.layers={1: 1, 3: 3}", "distill.intermediate.projection=each"]
    run = under(commands, teacher.run_dir, pruned.run_dir, "stranger", *own)
    first, *_, last = run.lines("train")
    assert last["kl"] < first["kl"]
    assert last["intermediate"] < first["intermediate"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "sizes", "more"),
    [
        ("full-recomputation", 1, {"recompute_granularity": "full"}, []),
        (
            "distributed-optimizer",
            2,
            {"data_parallel_size": 2, "micro_batch_size": 4},
            ["distill.optim.use_distributed_optimizer=true"],
        ),
        (
            "recomputed-states",
            1,
            {"recompute_granularity": "selective"},
            ["distill.intermediate.layers=late"],
        ),
        (
            "sharded-states",
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            ["distill.intermediate.layers=late", "distill.intermediate.embedding=true"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_change_no_loss(
    commands: Commands,
    teacher: Teacher,
    pruned: Pruned,
    name: str,
    count: int,
    sizes: dict[str, Any],
    more: list[str],
) -> None:
    states = [option for option in more if "intermediate" in option]
    alone = under(commands, pruned.run_dir, teacher.run_dir, f"{name}-alone", *states)
    run = under(commands, pruned.run_dir, teacher.run_dir, name, *more, count=count, **sizes)
    test_distill.same_losses(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["{1: 2, 3: 3}", "{2: 1, 3: 3}"], ids=["forth", "back"])
def test_states_move_to_another_stage(commands: Commands, teacher: Teacher, layers: str) -> None:
    """The student begins as the teacher, whose other layers it is to imitate."""
    own = [f"distill.intermediate.layers={layers}", "distill.intermediate.alpha=1"]
    name = f"moved-{layers[1]}"
    alone = under(commands, teacher.run_dir, teacher.run_dir, f"{name}-alone", *own)
    two = under(
        commands,
        teacher.run_dir,
        teacher.run_dir,
        name,
        *own,
        count=2,
        pipeline_model_parallel_size=2,
        micro_batch_size=2,
    )
    assert min(line["intermediate"] for line in alone.lines("train")) > 1e-3
    for ours, theirs in zip(two.lines("train"), alone.lines("train"), strict=True):
        assert ours["intermediate"] == pytest.approx(theirs["intermediate"], rel=1e-3)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-2, abs=1e-6)
    assert two.result["lm_loss_nats_after"] == pytest.approx(alone.result["lm_loss_nats_after"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_teacher_of_another_padding_teaches_the_same(
    commands: Commands, teacher: Teacher, pruned: Pruned, straight: Run, count: int
) -> None:
    """Rows beyond the tokenizer's entries take no part; on two ranks the heads are cut at different tokens."""
    from safetensors.torch import load_file, save_file

    padded = commands.home / f"padded-{count}"
    shutil.copytree(teacher.huggingface, padded)
    weights = load_file(padded / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((16, weights[name].shape[1]), 0.5)])
    save_file(weights, padded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 16}))
    run = under(
        commands, pruned.run_dir, padded, f"padded-{count}", count=count, tensor_model_parallel_size=count
    )
    test_distill.same_losses(run, straight)


@pytest.mark.slow
def test_bf16_mixed_stays_near_float32(
    commands: Commands, teacher: Teacher, pruned: Pruned, straight: Run
) -> None:
    run = under(commands, pruned.run_dir, teacher.run_dir, "bf16", precision="bf16-mixed")
    for split in ("train", "valid"):
        for ours, theirs in zip(run.lines(split), straight.lines(split), strict=True):
            assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-2)
            assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.1)


@pytest.mark.slow
def test_a_rate_that_is_too_high_ends_with_one(commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    """As a user types it: the first update makes weights whose losses are beyond float32."""
    run_dir = commands.home / "too-high"
    made = test_distill.overrides(commands, pruned.run_dir, teacher.run_dir, run_dir)
    ended = commands.run("distill", *made, "distill.optim.lr=1e30")
    assert ended.code == 1
    assert "step 1, samples 8 to 15 of the training data's order: a gradient is not finite" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: the run failed") or "error: " in ended.stderr
    assert not (run_dir / "result.json").exists()


@pytest.mark.slow
def test_a_corrected_teacher_knows_the_corpus_better_and_teaches(
    commands: Commands, teacher: Teacher, pruned: Pruned
) -> None:
    run_dir = commands.home / "corrected"
    ended = commands.run(
        "correct_teacher",
        *commands.data(),
        f"teacher={teacher.run_dir}",
        f"run_dir={run_dir}",
        "distill.max_steps=20",
        "distill.optim.warmup_steps=2",
    )
    result = ended.result()
    # There is no student that its progress could speak of; how fast it goes is beside each bar.
    assert all(bar in ended.stderr for bar in ("teacher before: 100%", "teacher after: 100%"))
    assert "student" not in ended.stderr
    assert re.search(r"teacher before: 100%.*[1-9][\d,]* tokens/s", ended.stderr)
    assert re.search(r"Epoch 0.*tokens_per_s=[1-9][\d.]+", ended.stderr + ended.stdout)
    assert result["recipe"] == "correct_teacher"
    assert result["params"] == teacher.result["params"]
    assert result["lm_loss_nats_before"] == pytest.approx(teacher.result["lm_loss_nats"], rel=1e-6)
    assert result["lm_loss_nats_after"] < result["lm_loss_nats_before"]
    losses = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if line["split"] == "train"] == list(range(20))
    run = under(commands, pruned.run_dir, run_dir, "by-corrected", "distill.max_steps=1")
    assert run.lines("teacher")[0]["lm_loss"] == pytest.approx(result["lm_loss_nats_after"], rel=1e-6)
