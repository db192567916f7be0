"""Multiple-choice tasks: a file of questions, and how often a sharded model prefers the right choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.data.records import Record, read_records
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.layer_removal import Block, LayerRemoval, merged
from nemo_minitron.evaluation.lm_loss import evaluating
from nemo_minitron.files import file_sha256


@dataclass(frozen=True)
class Question:
    """One record of a task file, `{"question": ..., "choices": [...], "answer": ...}`.

    `where`: for refusals, "FILE, line 3"; `answer`: an index of choices.
    """

    where: str
    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Request:
    """One choice after its question: token ids, and how many of the last ones are the choice's."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Task:
    """An encoded task file.

    Attributes:
        sha256: of the file.
        requests: of all questions, choice by choice, in the file's order.
        choices: how many each question has.
        answers: the right choice of each question, from 0.
    """

    sha256: str
    requests: list[Request]
    choices: list[int]
    answers: list[int]


def load_task(path: str | Path, tokenizer: Any, max_tokens: int, *, beginning: Sequence[int] = ()) -> Task:
    """Read and encode a task file.

    Each record (`data.records`) has `question` (a string), `choices` (at least two strings, all different) and
    `answer` (the right one's index from 0, or its text). A sample begins as a document does, or, where documents begin
    with nothing, with the end-of-document token that stands before each packed one; then come question and choice,
    joined by one space. The choice's tokens are those after the ones that the
    question alone has too.

    Args:
        tokenizer: of Hugging Face's interface.
        max_tokens: the model's context.
        beginning: of documents (`data.beginning`).

    Raises:
        InputError: no such file, an empty one, or a bad line: names the file and the line.
    """
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    questions = load_questions(path)
    requests = []
    for question in questions:
        for number, choice in enumerate(question.choices):
            request = _encode(question.question, choice, tokenizer, beginning)
            # The last token is predicted, never read.
            if (length := len(request.tokens) - 1) > max_tokens:
                raise InputError(
                    f"{question.where}: choice {number} makes {length} tokens with its question, the "
                    f"model's context has {max_tokens}"
                )
            requests.append(request)
    return Task(sha256, requests, [len(q.choices) for q in questions], [q.answer for q in questions])


def load_questions(path: str | Path) -> list[Question]:
    """The questions of a task file, one or more.

    Raises:
        InputError: as `load_task`.
    """
    questions = [_question(record) for record in read_records(path)]
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions


def _question(record: Record) -> Question:
    values, where = record.value, record.where
    if isinstance(values, InputError):
        raise values
    for key in ("question", "choices", "answer"):
        if key not in values:
            raise InputError(f"{where}: key {key!r} is missing")
    question, choices = values["question"], values["choices"]
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: question: must be a string that is not blank")
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{where}: choices: must be a list of at least 2 strings")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise InputError(f"{where}: choices: {choice!r} is no string, or blank")
        if choice in choices[:number]:
            raise InputError(f"{where}: choices: {choice!r} is there twice")
    return Question(where, question, choices, _answer(where, values["answer"], choices))


def _answer(where: str, answer: Any, choices: list[str]) -> int:
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    raise InputError(
        f"{where}: answer: {answer!r} is neither an index from 0 to {len(choices) - 1} nor one of the choices"
    )


def _encode(question: str, choice: str, tokenizer: Any, beginning: Sequence[int]) -> Request:
    question = question.rstrip()
    alone = tokenizer.encode(question, add_special_tokens=False)
    together = tokenizer.encode(f"{question} {choice.strip()}", add_special_tokens=False)
    # A tokenizer may join the question's end with what follows; what it joins is scored.
    same = next((i for i, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b), len(alone))
    return Request([*(beginning or [tokenizer.eos_token_id]), *together], len(together) - same)


def choice_losses(
    chunks: Sequence[Any],
    task: Task,
    blocks: Sequence[Block] = (),
    *,
    micro_batch_size: int,
    normalize: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The negative log-probability of each choice after its question, of the whole model and without each block.

    Args:
        chunks: this rank's GPTModel, in a list.
        blocks: what to leave out, one at a time (see `LayerRemoval`).
        micro_batch_size: choices in one forward pass; data-parallel ranks share the passes.
        normalize: divide by the choice's number of tokens.
        progress: called on every rank with about how many choices all ranks together have finished.

    Returns:
        Float64 [1 + blocks, requests], in nats (a token if normalised), on the CPU, the same on every rank.

    Raises:
        InputError: as `LayerRemoval`.
    """
    device = next(chunks[0].parameters()).device
    # Batches of similar lengths need little padding.
    order = sorted(range(len(task.requests)), key=lambda i: (-len(task.requests[i].tokens), i))
    batches = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    losses = torch.zeros(1 + len(blocks), len(order), dtype=torch.float64, device=device)
    with evaluating(chunks), LayerRemoval(chunks, blocks) as removal:
        for number in range(parallel.dp_rank(), len(batches), parallel.dp_size()):
            indices = batches[number]
            batch = {k: t.to(device) for k, t in _batch([task.requests[i] for i in indices]).items()}
            if (found := removal.losses(batch)) is not None:
                losses[:, indices] = found
            if progress is not None:
                progress(min(len(order), (number + parallel.dp_size()) * micro_batch_size))
    losses = merged(losses).cpu()
    lengths = torch.tensor([request.scored for request in task.requests], dtype=torch.float64)
    return losses / lengths if normalize else losses


def right_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`tokens` and `position_ids`, int64 [b, s], of rows of token ids; causal attention does not see the padding."""
    ranks = parallel.tp_size()  # sequence parallelism shares the positions
    length = -(-max(map(len, rows)) // ranks) * ranks
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    positions = torch.arange(length).expand(len(rows), length)
    return {"tokens": tokens, "position_ids": positions.contiguous()}


def _batch(requests: list[Request]) -> dict[str, Tensor]:
    """What is read of each request, and what is to come; the mask is on the choices' tokens."""
    batch = right_padded([request.tokens[:-1] for request in requests])
    labels, mask = torch.zeros_like(batch["tokens"]), torch.zeros(batch["tokens"].shape)
    for row, request in enumerate(requests):
        end = len(request.tokens) - 1
        labels[row, :end] = torch.tensor(request.tokens[1:])
        mask[row, end - request.scored : end] = 1
    return {**batch, "labels": labels, "loss_mask": mask}


def accuracy_and_margin(losses: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """How often the right choice is the most probable one, and by how much.

    Args:
        losses: [passes, requests], of `choice_losses`.

    Returns:
        Accuracy in [0, 1], where a tie counts as wrong, and the mean margin in nats: the log-probability of the right
        choice minus that of the best wrong one. Both float64 [passes].
    """
    margins = []
    for answer, own in zip(task.answers, losses.split(task.choices, dim=1), strict=True):
        wrong = torch.cat([own[:, :answer], own[:, answer + 1 :]], dim=1)
        margins.append(wrong.min(dim=1).values - own[:, answer])
    margin = torch.stack(margins, dim=1)
    return (margin > 0).double().mean(1), margin.mean(1)
