"""How fast this machine is: Megatron's layer of a model's sizes, the output layer with our loss, and Adam, timed.

A step's products are not all of one shape, and on a CPU norms, attention and activations take a third of it: so a layer
of the model's own sizes is run, as many tokens at a time as a microbatch has.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.arch import Architecture
from nemo_minitron.distillation.loss.losses import HiddenTeacher, distillation_loss
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.planning.memory import Training
from nemo_minitron.workflows.one_layer import built

_RUNS = 3
# What Adam is timed on.
_PARAMETERS = 4_000_000
_ROWS = 128  # of a vocabulary that is not used


def _seconds(work: Callable[[], Any]) -> float:
    """The middle one of a few runs, after one that does not count. On one thread CPU time, whatever else runs."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    taken = []
    for _ in range(_RUNS):
        begin = clock()
        work()
        taken.append(clock() - begin)
    return statistics.median(taken)


@functools.cache
def layer_seconds(a: Architecture, micro_batch: int, length: int, *, backward: bool) -> float:
    """Of one layer over a microbatch, forward, or forward and backward."""
    model = _one_layer(a, length)
    positions = getattr(model, "rotary_pos_emb", None)
    rotary = None if positions is None else positions(length)
    x = torch.randn(length, micro_batch, a.hidden_size)

    def forward() -> Tensor:
        """[s, b, h] of the layer, which also gives a context that decoders do not have."""
        return model.decoder.layers[0](x, attention_mask=None, rotary_pos_emb=rotary)[0]

    if not backward:
        with torch.no_grad():
            return _seconds(forward)
    x.requires_grad_()
    return _seconds(lambda: forward().sum().backward())


@functools.cache
def _one_layer(a: Architecture, length: int) -> Any:
    """Megatron's GPTModel with one layer of random weights, and next to no vocabulary."""
    return built(a.replace(num_layers=1, vocab_size=_ROWS), length)


@functools.cache
def output_seconds(a: Architecture, teacher: Architecture | None, micro_batch: int, length: int) -> float:
    """Of output layers, loss and their gradients over a microbatch; of a student alone, next tokens."""
    hidden = torch.randn(length, micro_batch, a.hidden_size, requires_grad=True)
    head = torch.randn(a.vocab_size, a.hidden_size).mul_(0.02).requires_grad_()
    labels = torch.zeros(micro_batch, length, dtype=torch.int64)
    if teacher is None:
        return _seconds(
            lambda: F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.T.flatten()).backward()
        )
    states = torch.randn(length, micro_batch, teacher.hidden_size)
    target = HiddenTeacher(states, torch.randn(a.vocab_size, teacher.hidden_size).mul_(0.02))
    mask = torch.ones(micro_batch, length)

    def work() -> None:
        sums = distillation_loss(
            hidden, head, target, mask, LossSettings(), vocab_size=a.vocab_size, labels=labels
        )
        sums.loss.backward()

    return _seconds(work)


@functools.cache
def adam_seconds_a_parameter() -> float:
    """Of the optimizer that runs take on a CPU, torch's fused one."""
    weight = torch.nn.Parameter(torch.randn(_PARAMETERS))
    weight.grad = torch.randn(_PARAMETERS)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return _seconds(optimizer.step) / _PARAMETERS


def step_seconds(t: Training, micro_batch: int) -> float:
    """Of a training step of one process here."""
    per_micro = t.student.num_layers * layer_seconds(t.student, micro_batch, t.length, backward=True)
    per_micro += output_seconds(t.student, t.teacher, micro_batch, t.length)
    if t.reference:
        per_micro += t.student.num_layers * layer_seconds(t.student, micro_batch, t.length, backward=False)
    if t.teacher is not None:
        per_micro += t.teacher.num_layers * layer_seconds(t.teacher, micro_batch, t.length, backward=False)
    steps = t.batch * t.sequences / micro_batch
    return per_micro * steps + t.student.parameters() * adam_seconds_a_parameter()


def pass_seconds(a: Architecture, tokens: int, micro_batch: int, length: int) -> float:
    """Of forward passes with the output layer over so many tokens."""
    layers = a.num_layers * layer_seconds(a, micro_batch, length, backward=False)
    # The loss's part forward and backward takes three products of the output layer; a forward pass has one.
    head = output_seconds(a, None, micro_batch, length) / 3
    return (layers + head) * tokens / (micro_batch * length)
