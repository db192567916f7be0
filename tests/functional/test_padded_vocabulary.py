"""Training with a vocabulary that two tensor-parallel ranks do not divide, beside the same in one process."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.source import find_source
from tests.distributed.test_padded_vocabulary import stored
from tests.functional import test_align, test_distill, test_distill_conditions
from tests.functional.conftest import Teacher
from tests.support import ranks, sessions
from tests.support.commands import Commands

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2}
ROWS = 527


def longer(teacher: Teacher, directory: Path, noise: float) -> Path:
    """The teacher with 15 more rows in its tables; all weights moved a little."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(teacher.huggingface, directory)
    weights, g = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = torch.cat([weight, torch.randn(15, weight.shape[1], generator=g) * weight.std()])
        weights[name] = weight + torch.randn(weight.shape, generator=g) * weight.std() * noise
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS}))
    return directory


@pytest.fixture(scope="module")
def student(commands: Commands, teacher: Teacher) -> Path:
    return longer(teacher, commands.home / "odd-student", 0.2)


@pytest.fixture(scope="module")
def odd_teacher(commands: Commands, teacher: Teacher) -> Path:
    return longer(teacher, commands.home / "odd-teacher", 0.0)


@pytest.mark.parametrize(
    "loss", ["distill.loss=forward_kl", "distill.loss=cross_entropy", "distill.top_k=5"], ids=str
)
def test_two_ranks_learn_what_one_does(
    commands: Commands, student: Path, odd_teacher: Path, loss: str
) -> None:
    name = loss.rpartition("=")[2]
    alone, both = (
        test_distill_conditions.under(
            commands,
            student,
            odd_teacher,
            f"odd-{name}-{count}",
            loss,
            "distill.optim.weight_decay=0.1",
            count=count,
            tensor_model_parallel_size=count,
        )
        for count in (1, 2)
    )
    test_distill.same_losses(both, alone)
    tables = [stored(str(run.run_dir / "checkpoint")) for run in (alone, both)]
    for key, table in tables[0].items():
        assert len(table) == ROWS
        torch.testing.assert_close(tables[1][key], table, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_a_cache_that_two_ranks_wrote_teaches_one(
    commands: Commands, student: Path, odd_teacher: Path, form: str
) -> None:
    steps = [f"distill.max_steps={test_distill.STEPS}", "distill.limit_val_batches=2", "distill.top_k=5"]
    cache = commands.home / f"odd-cache-{form}"
    commands.run(
        "cache_teacher",
        "+conf=width",
        *commands.data(),
        f"teacher={odd_teacher}",
        f"run_dir={cache}",
        f"cache.form={form}",
        *steps,
        "trainer.tensor_model_parallel_size=2",
        nproc=2,
    ).result()
    live, read = (
        test_distill_conditions.under(
            commands, student, odd_teacher, f"odd-{form}-{name}", "distill.top_k=5", *more
        )
        for name, more in (("live", []), ("read", [f"teacher_cache={cache}"]))
    )
    test_distill.same_losses(read, live)


def test_two_ranks_answer_what_one_does(commands: Commands, teacher: Teacher, student: Path) -> None:
    """NeMo-Aligner's losses, on answers and held out, and its greedy text."""
    made = dataclasses.replace(teacher, huggingface=student)
    data = test_align.conversation_files(commands.home / "odd-conversations")
    alone = test_align.align(commands, made, data, "odd-sft-1", *test_align.SAMPLES)
    sizes = test_align.LAYOUTS["tp2"]
    both = test_align.align(commands, made, data, "odd-sft-2", *sizes, *test_align.SAMPLES, nproc=2)
    assert both.samples(0) == alone.samples(0)
    for split in ("train", "valid"):
        assert both.steps(split) == pytest.approx(alone.steps(split), rel=1e-4)
    assert find_source(both.run_dir).architecture.vocab_size == ROWS
    for key, table in stored(str(alone.run_dir / "checkpoint")).items():
        torch.testing.assert_close(stored(str(both.run_dir / "checkpoint"))[key], table, rtol=1e-3, atol=1e-4)


def test_a_model_from_scratch_has_the_tokenizer_s_rows(commands: Commands) -> None:
    run_dir = commands.home / "odd-pretrained"
    sizes = ["data.vocab_size=515", "trainer.max_steps=3", "trainer.tensor_model_parallel_size=2"]
    result = commands.pretrain(run_dir, *sizes, nproc=2).result()
    checkpoint = result["checkpoint"]
    assert find_source(run_dir).architecture.vocab_size == 515
    assert {len(table) for table in stored(checkpoint).values()} == {515}
    tokens = torch.randint(515, (2, 33), generator=torch.Generator().manual_seed(2))
    (alone,) = ranks.run_on_ranks(1, sessions.loss_under, checkpoint, tokens, {}, timeout=240)
    both = ranks.run_on_ranks(2, sessions.loss_under, checkpoint, tokens, TP2, timeout=240)
    assert both == pytest.approx([alone] * 2, rel=1e-5)
