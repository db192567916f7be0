"""The kernels that are compiled on CUDA, run as written here, against torch's own functions and autograd in float64."""

import pytest
import torch
from torch.nn import functional

from nemo_minitron.distillation import LossSettings
from nemo_minitron.distillation.loss.batched_collectives import reduce_nothing, run_in_step
from nemo_minitron.distillation.loss.compiled import RecomputingForwardKL, ReportedNextToken
from nemo_minitron.distillation.loss.divergences import Scratch


def logits(seed: int) -> torch.Tensor:
    return torch.randn(11, 37, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7])
def test_forward_kl_and_its_gradient(temperature: float) -> None:
    student, teacher, weight = logits(0), logits(1), torch.rand(11, dtype=torch.float64)
    ours = RecomputingForwardKL(
        student.clone(),
        teacher.clone(),
        LossSettings(temperature=temperature),
        Scratch(11, 37, torch.float64, student.device),
    )
    run_in_step([ours.steps()], reduce_nothing)
    student.requires_grad_()
    q, p = ((t / temperature).log_softmax(1) for t in (student, teacher))
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(1) * temperature**2
    (kl * weight).sum().backward()
    torch.testing.assert_close(ours.per_token, kl.detach(), rtol=1e-12, atol=1e-12)
    ours.write_gradient(weight)
    torch.testing.assert_close(ours.student, student.grad, rtol=1e-10, atol=1e-12)


def test_cross_entropy_leaves_the_logits_alone() -> None:
    student, labels = logits(2), torch.arange(11)
    given = student.clone()
    ours = ReportedNextToken(given, labels, given)
    run_in_step([ours.steps()], reduce_nothing)
    wanted = functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(ours.per_token, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(given, student)
