"""recipes/distill.py on conversations: the answers alone are learned. transformers' models are the reference."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.data.chat.template import CHAT_TEMPLATE
from tests.functional.conftest import Teacher
from tests.functional.test_distill import Run, lines
from tests.support import conversations
from tests.support.commands import SEQ_LENGTH, Commands

STEPS = 3
LAYOUTS = {
    "tp2-pp2": (
        4,
        [
            "tensor_model_parallel_size=2",
            "pipeline_model_parallel_size=2",
            "sequence_parallel=true",
            "micro_batch_size=2",
        ],
    ),
    "dp2": (2, ["data_parallel_size=2", "micro_batch_size=4"]),
}


@pytest.fixture(scope="module")
def student(commands: Commands, teacher: Teacher) -> Path:
    """The teacher, with noise on its weights."""
    made = commands.home / "noisy-hf"
    shutil.copytree(teacher.huggingface, made)
    model = AutoModelForCausalLM.from_pretrained(made)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    model.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def files(commands: Commands) -> dict[str, Path]:
    """Eight conversations to learn from: one batch, unless they are packed."""
    where = commands.home / "talks"
    return {
        "train": conversations.conversations(where / "train.jsonl", range(8)),
        "valid": conversations.conversations(where / "valid.jsonl", range(100, 105)),
    }


def distil(
    commands: Commands,
    teacher: Teacher,
    student: Path,
    files: dict[str, Path],
    name: str,
    *more: str,
    nproc: int | None = None,
) -> Run:
    run_dir = commands.home / f"talked-{name}"
    made = [
        *commands.data(),
        "distill=instruct",
        f"student={student}",
        *(
            []
            if any(each.startswith("teacher_cache") for each in more)
            else [f"teacher={teacher.huggingface}"]
        ),
        f"run_dir={run_dir}",
        *schedule(files),
        *more,
    ]
    return Run(run_dir, commands.run("distill", *made, nproc=nproc).result())


def schedule(files: dict[str, Path]) -> list[str]:
    return [
        *(f"distill.conversations.{name}={file}" for name, file in files.items()),
        f"distill.max_steps={STEPS}",
        "distill.optim.warmup_steps=1",
        "distill.limit_val_batches=1",
    ]


@pytest.fixture(scope="module")
def alone(commands: Commands, teacher: Teacher, student: Path, files: dict[str, Path]) -> Run:
    return distil(commands, teacher, student, files, "alone", "distill.conversations.packed=false")


def test_the_first_step_is_transformers_on_the_answers(
    alone: Run, teacher: Teacher, student: Path, files: dict[str, Path]
) -> None:
    """Mean over all answers' tokens of the batch, prompts left out, by transformers' own masks."""
    tokenizer = AutoTokenizer.from_pretrained(teacher.huggingface)
    tokenizer.chat_template = CHAT_TEMPLATE
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(d, torch_dtype=torch.float64)
        for d in (student, teacher.huggingface)
    )
    found = {name: torch.zeros(3, dtype=torch.float64) for name in files}
    for name, file in files.items():
        for row in conversations.rows_of(file):
            read = tokenizer.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids = torch.tensor(read["input_ids"])
            mask = torch.tensor(read["assistant_masks"])[1:]
            with torch.no_grad():
                p, q = (model(ids[None, :-1]).logits[0].log_softmax(-1) for model in (ours, theirs))
            kl, ce = (q.exp() * (q - p)).sum(-1), F.nll_loss(p, ids[1:], reduction="none")
            found[name] += torch.stack([(kl * mask).sum(), (ce * mask).sum(), mask.sum()])
    kl, ce, count = found["train"].tolist()
    first = alone.lines("train")[0]
    assert first["tokens"] == count
    assert first["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert first["lm_loss"] == pytest.approx(ce / count, rel=1e-4)
    result = alone.result
    assert result["answer_loss_nats_before"] == pytest.approx(
        float(found["valid"][1] / found["valid"][2]), rel=1e-4
    )
    assert result["conversations_valid_answer_tokens"] == int(found["valid"][2])


def test_it_learns_and_the_result_carries_the_template(alone: Run) -> None:
    result = alone.result
    kls = [line["kl"] for line in alone.lines("train")]
    assert kls[-1] < kls[0]
    assert result["answer_loss_nats_after"] != result["answer_loss_nats_before"]
    assert (result["conversations_weight"], result["conversations_packed"]) == (1.0, False)
    assert (result["conversations_train_samples"], result["conversations_train_refused"]) == (8, 0)
    kept = AutoTokenizer.from_pretrained(alone.run_dir / "checkpoint" / "context" / "tokenizer")
    assert kept.chat_template == CHAT_TEMPLATE


@pytest.fixture(scope="module")
def mixed(commands: Commands, teacher: Teacher, student: Path, files: dict[str, Path]) -> Run:
    """Packed, and a third of the sequences of text."""
    return distil(commands, teacher, student, files, "mixed", "distill.conversations.weight=0.67")


@pytest.mark.slow
def test_text_and_conversations_learn_together(mixed: Run) -> None:
    """All of a text's tokens count, and of a conversation's the answers: Megatron's order of the two sets."""
    counts = [line["tokens"] for line in mixed.lines("train")]
    text = [count // SEQ_LENGTH for count in counts]
    assert text == [3, 2, 3]
    assert mixed.result["lm_loss_nats_after"] < mixed.result["lm_loss_nats_before"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_changes_nothing(
    commands: Commands, teacher: Teacher, student: Path, files: dict[str, Path], mixed: Run, name: str
) -> None:
    """Nor do the microbatches, which have more answers or fewer."""
    nproc, layout = LAYOUTS[name]
    other = distil(
        commands,
        teacher,
        student,
        files,
        name,
        "distill.conversations.weight=0.67",
        *(f"trainer.{each}" for each in layout),
        nproc=nproc,
    )
    same(other, mixed)


def same(other: Run, one: Run) -> None:
    for split in ("train", "valid"):
        pairs = zip(lines(other.run_dir, split), lines(one.run_dir, split), strict=True)
        for theirs, ours in pairs:
            assert theirs == pytest.approx(ours, rel=2e-4)
    for key in ("answer_loss_nats_before", "answer_loss_nats_after", "lm_loss_nats_after"):
        assert other.result[key] == pytest.approx(one.result[key], rel=2e-4)


@pytest.mark.slow
def test_a_cached_teacher_teaches_the_same(
    commands: Commands, teacher: Teacher, student: Path, files: dict[str, Path], mixed: Run
) -> None:
    cached = commands.home / "talked-cache"
    weight = "distill.conversations.weight=0.67"
    made = [*commands.data(), "distill=instruct", weight, *schedule(files), f"teacher={teacher.huggingface}"]
    commands.run("cache_teacher", *made, "cache=hidden", f"run_dir={cached}").result()
    same(distil(commands, teacher, student, files, "cached", weight, f"teacher_cache={cached}"), mixed)
    refused = commands.run(
        "distill",
        *commands.data(),
        "distill=instruct",
        *schedule(files),
        f"student={student}",
        f"teacher_cache={cached}",
        f"run_dir={commands.home / 'other'}",
    )
    assert refused.code == 2
    assert "other conversations" in refused.stderr
