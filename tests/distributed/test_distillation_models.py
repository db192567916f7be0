"""Distillation of real Megatron GPTModels: all gradients against plain torch in float64, copies, and overfitting."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation import HiddenTeacher, LossSettings, distillation_loss
from nemo_minitron.distillation.intermediate import EMBEDDING, Intermediate
from tests.support import kd_reference
from tests.support.pruning_models import LLAMA
from tests.support.ranks import Layout, layout
from tests.support.reference import Reference, full_state_dict, full_weights, tiny_model

TEACHER = LLAMA.replace(num_layers=4)
NARROW = LLAMA.replace(num_layers=2, hidden_size=24)
SHALLOW = LLAMA.replace(num_layers=2)
LAYERS = {1: 0, 3: 1}
ALPHA = 0.7
SETTINGS = LossSettings(temperature=1.5, ce_weight=0.3)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and mask [b, s]."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (2, 9), generator=g)
    return tokens[:, :-1], tokens[:, 1:], (torch.rand(2, 8, generator=g) > 0.3).float()


def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """[s, b, h], [s/tp, b, h] under sequence parallelism."""
    s = tokens.shape[1]
    future = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    return model(tokens, torch.arange(s).expand_as(tokens), future)


def gives_hidden_states(model: Any) -> Any:
    model._postprocess = lambda hidden_states, *args, **kwargs: hidden_states
    return model


@dataclass
class Found:
    kd: float
    distance: float
    gradients: dict[str, Tensor]


def distil(
    student: Any, teacher: Any, between: Intermediate | None, at: Layout, settings: LossSettings = SETTINGS
) -> Found:
    """One step's loss and gradients, as `nemo.distill_transform.DistillTransform` makes them on one stage."""
    from nemo_minitron.nemo.intermediate_states import PROJECTION, IntermediateLosses, add_projections

    tokens, labels, mask = batch()
    distance = 0.0
    if between is not None:
        add_projections(student, between, teacher.config.hidden_size)
        compared = IntermediateLosses(between, student, teacher)
    with torch.no_grad():
        theirs = hidden_states(gives_hidden_states(teacher), tokens)
    if between is not None:
        compared.begin(compared.take(), mask, ALPHA / float(mask.sum()))
    sums = distillation_loss(
        hidden_states(gives_hidden_states(student), tokens),
        student.output_layer.weight,
        HiddenTeacher(theirs, teacher.output_layer.weight),
        mask,
        settings,
        vocab_size=64,
        labels=labels,
    )
    (sums.loss / sums.tokens).backward()
    if between is not None:
        distance = compared.total() / float(sums.tokens)
    assert all(p.grad is None for p in teacher.parameters())
    gradients = {}
    projections = getattr(student, PROJECTION, None)
    if projections is not None:
        delattr(student, PROJECTION)
        gradients = {f"projection.{name}": p.grad for name, p in projections.weights.items()}
        if at.sp:
            assert all(p.sequence_parallel for p in projections.parameters())
            gradients = {name: parallel.all_reduce(g, "tp") for name, g in gradients.items()}
    for p in student.parameters():
        # What Megatron's finalize_model_grads does for parameters that see a part of the tokens.
        if at.sp and getattr(p, "sequence_parallel", False):
            parallel.all_reduce(p.grad, "tp")
        p.data = p.grad
    return Found(float(sums.kd / sums.tokens), distance, gradients | full_state_dict(student))


def starts(student: Any, between: Intermediate) -> dict[str, Tensor]:
    """First values of the projections, float64."""
    from nemo_minitron.nemo.intermediate_states import PROJECTION, add_projections

    add_projections(student, between, TEACHER.hidden_size)
    projections = getattr(student, PROJECTION, None)
    if projections is None:
        return {}
    delattr(student, PROJECTION)
    return {name: p.detach().double() for name, p in projections.weights.items()}


def expected(arch: Any, between: Intermediate, projections: dict[str, Tensor]) -> Found:
    """The same in float64 with whole logits, by autograd alone."""
    tokens, labels, mask = batch()
    weights = {n: w.requires_grad_() for n, w in full_weights(arch, 1, torch.float64).items()}
    maps = {n: w.clone().requires_grad_() for n, w in projections.items()}
    student, teacher = Reference(weights, arch), Reference(full_weights(TEACHER, 2, torch.float64), TEACHER)
    logits = [model(tokens).transpose(0, 1) for model in (student, teacher)]
    loss, kd, _ = kd_reference.loss_sums(*logits, mask.double(), labels=labels, **vars(SETTINGS))

    def state(model: Reference, layer: int | str) -> Tensor:
        if layer == EMBEDDING:
            return model.kept[0]["in" if between.at == "output" else "norm1"]
        if between.at == "output":
            return model.kept[layer]["out"]
        return model.kept[layer + 1]["norm1"] if layer + 1 < len(model.kept) else model.final_norm

    total = torch.zeros((), dtype=torch.float64)
    for of_teacher, of_student in between.pairs:
        x, y = state(student, of_student), state(teacher, of_teacher)
        if maps:
            x = x @ maps["shared" if between.projection != "each" else f"state_{of_student}"].T
        if between.distance == "mse":
            each = ((x - y) ** 2).mean(-1)
        else:
            each = 1 - (x * y).sum(-1) / (x.pow(2).sum(-1).sqrt() * y.pow(2).sum(-1).sqrt())
        total = total + (each * mask).sum()
    ((loss + ALPHA * total) / mask.sum()).backward()
    gradients = {f"projection.{n}": w.grad for n, w in maps.items()} | {n: w.grad for n, w in weights.items()}
    return Found(float(kd / mask.sum()), float(total / mask.sum()), gradients)


def close(found: Found, wanted: Found) -> None:
    assert found.kd == pytest.approx(wanted.kd, rel=1e-4)
    assert found.distance == pytest.approx(wanted.distance, rel=1e-4)
    assert found.gradients.keys() == wanted.gradients.keys()
    largest = max(float(g.abs().max()) for g in wanted.gradients.values())
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient.double(), wanted.gradients[name], rtol=1e-3, atol=1e-5 * largest)


def gradients_of_every_kind(tp: int, sp: bool) -> None:
    torch.set_num_threads(1)
    at = layout(tp=tp, sp=sp)
    kinds = [(SHALLOW, None), (SHALLOW, "shared"), (NARROW, None), (NARROW, "each")]
    for (arch, projection), place, distance in itertools.product(
        kinds, ("output", "norm"), ("cosine", "mse")
    ):
        between = Intermediate(LAYERS, True, place, distance, ALPHA, projection)
        student = tiny_model(arch, 1, sequence_parallel=sp)
        teacher = tiny_model(TEACHER, 2, sequence_parallel=sp).requires_grad_(False)
        wanted = expected(arch, between, starts(student, between))
        close(distil(student, teacher, between, at), wanted)


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True)])
def test_gradients_with_intermediate_states(run_on_ranks: Any, tp: int, sp: bool) -> None:
    run_on_ranks(tp, gradients_of_every_kind, tp, sp)


def copies(tp: int, sp: bool) -> None:
    torch.set_num_threads(1)
    at = layout(tp=tp, sp=sp)
    for distance, place in itertools.product(("cosine", "mse"), ("output", "norm")):
        between = Intermediate({i: i for i in range(4)}, True, place, distance, ALPHA)
        student, teacher = (tiny_model(TEACHER, 2, sequence_parallel=sp) for _ in range(2))
        other = tiny_model(SHALLOW, 1, sequence_parallel=sp)
        scale = max(float(g.abs().max()) for g in distil(other, teacher, None, at).gradients.values())
        found = distil(student, teacher.requires_grad_(False), between, at, LossSettings(temperature=1.5))
        assert abs(found.kd) < 1e-6
        assert abs(found.distance) < 1e-6
        assert scale > 0.01
        for name, gradient in found.gradients.items():
            assert gradient.abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_an_identical_copy_has_no_loss_and_no_gradient(run_on_ranks: Any, tp: int, sp: bool) -> None:
    run_on_ranks(tp, copies, tp, sp)


def overfitted() -> list[float]:
    """KL by step of a random student of the teacher's shape on one batch."""
    torch.set_num_threads(1)
    layout()
    student, teacher = tiny_model(SHALLOW, 1), tiny_model(TEACHER, 2).requires_grad_(False)
    tokens, _, mask = batch()
    with torch.no_grad():
        theirs = hidden_states(gives_hidden_states(teacher), tokens)
    optimizer = torch.optim.Adam(gives_hidden_states(student).parameters(), lr=5e-3)
    seen = []
    for _ in range(200):
        sums = distillation_loss(
            hidden_states(student, tokens),
            student.output_layer.weight,
            HiddenTeacher(theirs, teacher.output_layer.weight),
            torch.ones_like(mask),
            LossSettings(),
            vocab_size=64,
        )
        optimizer.zero_grad()
        (sums.loss / sums.tokens).backward()
        optimizer.step()
        seen.append(float(sums.kd / sums.tokens))
    return seen


def test_a_tiny_student_can_be_overfitted_to_its_teacher(run_on_ranks: Any) -> None:
    (kl,) = run_on_ranks(1, overfitted)
    assert kl[0] > 0.5
    assert kl[-1] < 1e-3
