"""Losses without layers, under every layout: those of the plain reference with the layers physically left out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.layer_removal import LayerRemoval
from nemo_minitron.evaluation.multiple_choice import Request, Task
from nemo_minitron.importance.depth_metrics import lm_loss_scores, task_scores
from nemo_minitron.pruning import Kept, PrunePlan
from tests.distributed.test_importance_layouts import FIRST_HAS_1, GPT, LAYOUTS, LLAMA
from tests.support.pruned_by_hand import slice_weights
from tests.support.ranks import layout
from tests.support.reference import Reference, full_weights, tiny_model
from tests.support.sessions import samples

Run = Callable[..., list[Any]]
LENGTHS = [1, 2, 3]
EACH = {
    **{name: LAYOUTS[name] for name in ("tp2", "tp2-sp", "pp2-uneven", "dp2", "tp2-pp2-sp")},
    "pp2-dp2": (4, {"pp": 2}, {"num_layers_in_first_pipeline_stage": 3}),
    "pp4": (4, {"pp": 4}, {}),
}
each_layout = pytest.mark.parametrize(("world_size", "sizes", "options"), EACH.values(), ids=EACH)


def the_text(vocab_size: int) -> Tensor:
    """5 samples of 8 tokens and their next ones, [5, 9]."""
    return torch.randint(vocab_size, (5, 9), generator=torch.Generator().manual_seed(5))


def reference_without(arch: Any, weights: Any, start: int, length: int) -> Reference:
    kept = [i for i in range(arch.num_layers) if not start <= i < start + length]
    target = arch.replace(num_layers=len(kept))
    return Reference(slice_weights(weights, PrunePlan("", arch, target, {}, Kept(layers=kept))), target)


def the_blocks(arch: Any, length: int) -> list[tuple[int, int]]:
    return [(start, length) for start in range(arch.num_layers - length + 1)]


def named(metric: str, length: int) -> str:
    return f"layers/{metric}" if length == 1 else f"blocks/{metric}/{length}"


def scores(arch: Any, sizes: dict, options: dict, weights: Any = None) -> dict[str, Tensor]:
    at = layout(**sizes)
    model = tiny_model(arch, weights=weights, sequence_parallel=at.sp, **options).train()
    layers, data, seen = list(model.decoder.layers), samples(the_text(arch.vocab_size)), []
    found = lm_loss_scores([model], data, len(data), LENGTHS, micro_batch_size=2, progress=seen.append)
    assert seen[-1] == len(range(parallel.dp_rank(), 5, parallel.dp_size()))
    assert model.training
    assert list(model.decoder.layers) == layers
    return found


@each_layout
@pytest.mark.parametrize("arch", [LLAMA, GPT], ids=["llama", "gpt"])
def test_lm_loss_without_layers(run_on_ranks: Run, arch: Any, world_size: int, sizes: dict, options: dict):
    text = the_text(arch.vocab_size)
    by_rank = run_on_ranks(world_size, scores, arch, sizes, options)
    for length in LENGTHS:
        expected = []
        for block in the_blocks(arch, length):
            logits = reference_without(arch, full_weights(arch), *block)(text[:, :-1])
            expected.append(F.cross_entropy(logits.double().flatten(0, 1), text[:, 1:].flatten()))
        for found in by_rank:
            assert sorted(found) == sorted(named("lm_loss", n) for n in LENGTHS)
            values = found[named("lm_loss", length)]
            assert values.dtype == torch.float32
            assert torch.equal(values, by_rank[0][named("lm_loss", length)])
            torch.testing.assert_close(values.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def bfloat16_scores(sizes: dict) -> dict[str, Tensor]:
    at = layout(**sizes)
    model = tiny_model(LLAMA, sequence_parallel=at.sp, dtype=torch.bfloat16)
    data = samples(the_text(LLAMA.vocab_size))
    return lm_loss_scores([model], data, 5, [1], micro_batch_size=5)


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"tp": 2, "sp": True}], ids=["pp2", "tp2-sp"])
def test_bfloat16(run_on_ranks: Run, sizes: dict) -> None:
    text, weights = the_text(LLAMA.vocab_size), full_weights(LLAMA, dtype=torch.bfloat16)
    weights = {name: value.float() for name, value in weights.items()}
    expected = [
        F.cross_entropy(
            reference_without(LLAMA, weights, *block)(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()
        )
        for block in the_blocks(LLAMA, 1)
    ]
    for found in run_on_ranks(2, bfloat16_scores, sizes):
        torch.testing.assert_close(found["layers/lm_loss"], torch.stack(expected), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("biases", "place"),
    [
        # Float32 ends at 3.4e38: where two of a sign meet the state is infinite, and its norm not a number.
        ({0: 3e38, 1: -3e38, 2: 3e38}, "without layer 1"),
        ({0: 3e38, 2: 3e38}, "of the whole model"),
        ({0: 1.5e38, 1: -0.75e38, 2: -0.75e38, 3: 2.5e38}, "without layers 1 to 2"),
    ],
    ids=["layer", "whole", "block"],
)
@pytest.mark.parametrize("sizes", [{"pp": 2}, {"tp": 2}], ids=["pp2", "tp2"])
def test_not_a_number_names_the_layers(run_on_ranks: Run, sizes: dict, biases: dict, place: str) -> None:
    arch = LLAMA.replace(add_bias_linear=True)
    weights = full_weights(arch)
    for layer, value in biases.items():
        weights[f"decoder.layers.{layer}.mlp.linear_fc2.bias"][:] = value
    with pytest.raises(InputError, match=f"NaN or infinity in the LM loss {place}$"):
        run_on_ranks(2, scores, arch, sizes, {}, weights)
    # Had one rank gone on alone, it would now hang in a collective and the ranks would have been killed.
    assert run_on_ranks(2, parallel.tp_rank, timeout=20) == [0, 0]


def calls_of_layers(lengths: list[int]) -> int:
    layout()
    model, calls = tiny_model(LLAMA), []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    lm_loss_scores([model], samples(the_text(LLAMA.vocab_size)), 5, lengths, micro_batch_size=5)
    return len(calls)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([1], 4 + 3 + 2 + 1 + 0),  # the whole model, then what comes after each layer
        ([2], 4 + 2 + 1 + 0),
        ([1, 3], 4 + 3 + 2 + 1 + 0 + 1 + 0),
    ],
)
def test_what_comes_before_a_block_runs_once(run_on_ranks: Run, lengths: list[int], calls: int) -> None:
    assert run_on_ranks(1, calls_of_layers, lengths) == [calls]


def virtual_stages() -> None:
    layout()
    model = tiny_model(LLAMA)
    with LayerRemoval([model, model], []):
        pass


def test_virtual_stages_are_refused(run_on_ranks: Run) -> None:
    with pytest.raises(InputError, match="2 virtual pipeline stages"):
        run_on_ranks(1, virtual_stages)


# ---- a task ------------------------------------------------------------------------------------------------


def the_task() -> Task:
    """7 questions with 2 to 4 choices of 1 to 3 tokens after 2 to 5 of the question."""
    generator = torch.Generator().manual_seed(11)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    requests, choices, answers = [], [], []
    for _ in range(7):
        question = [0, *draw(1, LLAMA.vocab_size, draw(2, 6)[0])]
        choices += draw(2, 5)
        answers += draw(0, choices[-1])
        for _ in range(choices[-1]):
            scored = draw(1, 4)[0]
            requests.append(Request([*question, *draw(1, LLAMA.vocab_size, scored)], scored))
    return Task("", requests, choices, answers)


def expected_margins(model: Reference, task: Task, normalize: bool) -> list[float]:
    """By a loop over the choices, one at a time, without padding."""
    requests, margins = iter(task.requests), []
    for count, answer in zip(task.choices, task.answers, strict=True):
        logs = []
        for _ in range(count):
            request = next(requests)
            tokens = torch.tensor(request.tokens)
            table = model(tokens[None, :-1])[0].double().log_softmax(-1)
            each = table[torch.arange(len(tokens) - 1), tokens[1:]][-request.scored :]
            logs.append(float(each.mean() if normalize else each.sum()))
        margins.append(logs[answer] - max(logs[:answer] + logs[answer + 1 :]))
    return margins


def scores_by_task(sizes: dict, options: dict, normalize: bool) -> dict[str, Tensor]:
    at = layout(**sizes)
    model = tiny_model(LLAMA, sequence_parallel=at.sp, **options)
    return task_scores([model], the_task(), LENGTHS, micro_batch_size=3, normalize=normalize)


@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(
    ("world_size", "sizes", "options"),
    [(1, {}, {}), LAYOUTS["tp2-sp"], LAYOUTS["dp2"], (4, {"pp": 2, "tp": 2}, FIRST_HAS_1)],
    ids=["one", "tp2-sp", "dp2", "tp2-pp2-uneven"],
)
def test_a_task_without_layers(
    run_on_ranks: Run, world_size: int, sizes: dict, options: dict, normalize: bool
) -> None:
    task, weights = the_task(), full_weights(LLAMA)
    whole = expected_margins(Reference(weights, LLAMA), task, normalize)
    by_rank = run_on_ranks(world_size, scores_by_task, sizes, options, normalize)
    for length in LENGTHS:
        expected = []
        for block in the_blocks(LLAMA, length):
            margins = expected_margins(reference_without(LLAMA, weights, *block), task, normalize)
            right = sum(m > 0 for m in whole) - sum(m > 0 for m in margins)
            lost = (sum(whole) - sum(margins)) / 7
            expected.append(right / 7 + lost / (1 + abs(lost)) / 14)
        for found in by_rank:
            values = found[named("task", length)].double()
            torch.testing.assert_close(values, torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
