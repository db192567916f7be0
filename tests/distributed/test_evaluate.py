"""What recipes/evaluate.py asks of a model, under every layout, beside transformers on the same weights."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.distributed.test_sessions import CONTEXT, VOCAB_SIZE, Example, example
from tests.support import sessions
from tests.support.sessions import PATIENCE_S

LAYOUTS = [
    {},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"data_parallel_size": 2},
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return example(tmp_path_factory.mktemp("evaluated"))


def drawn(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def requests() -> list[tuple[list[int], int]]:
    """(tokens, scored): of many lengths, whole contexts, and some that differ in their last token only."""
    made = [(tokens, 1 + i % 4) for i, tokens in enumerate(drawn([6, 9, CONTEXT + 1, 5, 21, 33, 12]))]
    return made + [([*made[4][0][:-1], token], 1) for token in (3, 7, 11, 60)]


def expected(model: Any, tokens: list[int], scored: int) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -scored:].double()
    labels = torch.tensor(tokens[-scored:])
    chosen = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
    return float(chosen), bool((logits.argmax(-1) == labels).all())


def greedy(model: Any, prompt: list[int], end: int) -> list[int]:
    """Six tokens at most, without the end token, by one whole forward pass each."""
    new: list[int] = []
    while len(new) < 6:
        with torch.no_grad():
            token = int(model(torch.tensor([prompt + new])).logits[0, -1].argmax())
        if token == end:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("sizes", LAYOUTS, ids=["one", "tp2", "pp2", "dp2"])
def test_answers_are_transformers_own_under_every_layout(
    run_on_ranks: Any, toy: Example, sizes: dict[str, int]
) -> None:
    model = LlamaForCausalLM.from_pretrained(toy.huggingface, attn_implementation="eager").eval()
    asked, prompts = requests(), drawn([4, 11, 7, 7, 2])
    plain = [greedy(model, prompt, -1) for prompt in prompts]
    # A token that the first answer holds ends it; a string that the second one's third token completes ends that one.
    end, stop = plain[0][3], f"w{plain[1][2]}"
    found = run_on_ranks(
        max(1, *sizes.values()) if sizes else 1,
        sessions.answered_under,
        toy.nemo,
        asked,
        prompts,
        [stop],
        [end],
        sizes,
        timeout=PATIENCE_S,
    )
    scores, written = found[0]
    for request, (value, best) in zip(asked, scores, strict=True):
        reference, is_best = expected(model, *request)
        assert value == pytest.approx(reference, abs=1e-4)
        assert best == is_best
    for prompt, new in zip(prompts, written, strict=True):
        whole = greedy(model, prompt, end)
        stopped = [i for i, token in enumerate(whole) if stop in f"w{token}"]
        assert new == (whole[: stopped[0] + 1] if stopped else whole)
    assert len(written[0]) < 6
    assert len(written[1]) == 3 or end in plain[1][:3]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Of one vocabulary with the toy, and wider."""
    return example(tmp_path_factory.mktemp("teacher"), hidden_size=48, num_hidden_layers=2)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=["one", "tp2", "pp2", "dp2"])
def test_figures_of_text_are_transformers_own_under_every_layout(
    run_on_ranks: Any, toy: Example, other: Example, sizes: dict[str, int]
) -> None:
    found = run_on_ranks(
        max(1, *sizes.values()) if sizes else 1,
        sessions.figures_under,
        toy.nemo,
        other.nemo,
        toy.tokens,
        sizes,
        timeout=PATIENCE_S,
    )
    labels = toy.tokens[:, 1:]
    with torch.no_grad():
        teacher = LlamaForCausalLM.from_pretrained(other.huggingface, attn_implementation="eager").eval()
        p = teacher(toy.tokens[:, :-1]).logits.double().log_softmax(-1)
    q = toy.logits.double().log_softmax(-1)
    losses = -q.gather(2, labels[..., None])[..., 0]
    for figures in found:
        assert figures.tokens == labels.numel()
        assert figures.nats == pytest.approx(float(losses.mean()), abs=1e-5)
        # All sequences are equally long, so the ratio is a mean of means.
        assert figures.stderr == pytest.approx(float(losses.mean(1).std() / len(labels) ** 0.5), rel=1e-3)
        assert figures.accuracy == pytest.approx(float((q.argmax(-1) == labels).double().mean()))
        assert figures.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
        assert figures.agreement == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))
        assert figures.teacher_nats == pytest.approx(-float(p.gather(2, labels[..., None]).mean()), abs=1e-5)
