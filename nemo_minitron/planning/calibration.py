"""How fast this machine is: one layer and the output layer of a model, timed with torch's own operations and our loss.

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

_RUNS = 3
# What Adam is timed on.
_PARAMETERS = 4_000_000


class Layer:
    """Random weights of one layer; forward as the local layers compute it, less the positions' own table."""

    def __init__(self, a: Architecture) -> None:
        self.a = a
        gates = 2 if a.gated_linear_unit else 1
        shapes = {
            "qkv": (a.query_size + 2 * a.key_value_size, a.hidden_size),
            "proj": (a.hidden_size, a.query_size),
            "fc1": (gates * a.ffn_hidden_size, a.hidden_size),
            "fc2": (a.hidden_size, a.ffn_hidden_size),
            "norm1": (a.hidden_size,),
            "norm2": (a.hidden_size,),
        }
        self.weights = {name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] to the same."""
        a, w, (s, b, _) = self.a, self.weights, x.shape
        mixed = F.linear(F.rms_norm(x, (a.hidden_size,), w["norm1"]), w["qkv"])
        q, k, v = mixed.split([a.query_size, a.key_value_size, a.key_value_size], dim=-1)
        groups = a.num_query_groups

        def heads(t: Tensor, number: int) -> Tensor:
            return t.reshape(s, b * groups, number, a.kv_channels).permute(1, 2, 0, 3)

        q, k, v = heads(q, a.heads_per_group), heads(k, 1), heads(v, 1)
        q, k = _rotated(q), _rotated(k)
        shared = (-1, a.heads_per_group, -1, -1)
        context = F.scaled_dot_product_attention(q, k.expand(shared), v.expand(shared), is_causal=True)
        x = x + F.linear(context.permute(2, 0, 1, 3).reshape(s, b, -1), w["proj"])
        inner = F.linear(F.rms_norm(x, (a.hidden_size,), w["norm2"]), w["fc1"])
        if a.gated_linear_unit:
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        return x + F.linear(inner, w["fc2"])


def _rotated(t: Tensor) -> Tensor:
    """Work of rotary positions: [..., s, d] turned by angles that stand for any."""
    angles = torch.arange(t.size(-2), dtype=t.dtype).unsqueeze(1).expand(-1, t.size(-1))
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


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
    layer = Layer(a)
    x = torch.randn(length, micro_batch, a.hidden_size)
    if not backward:
        with torch.no_grad():
            return _seconds(lambda: layer.forward(x))
    x.requires_grad_()
    for weight in layer.weights.values():
        weight.requires_grad_()
    return _seconds(lambda: layer.forward(x).sum().backward())


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
