"""Bytes that the ranks of a run need: weights, gradients, optimizer, activations, the loss, a teacher and its states.

What is kept for the backward pass is that of the local layers (`cpu_compat.local_spec`), counted value by value;
Transformer Engine's fused ones keep less. Sums are upper bounds where stages or ranks differ: the fullest one counts.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.distillation.loss.fused import chunk_tokens, default_chunk_bytes
from nemo_minitron.padding import padded_rows

# Bytes of a value: weights and activations; gradients and both of Adam's states are float32 in either precision, and
# bf16-mixed has float32 masters too (nemo_toolkit 2.4.1, MegatronMixedPrecision: grad_reduce_in_fp32).
_VALUE = {"32": 4, "bf16-mixed": 2}
_GRADIENT = 4
_STATES = {"32": 8, "bf16-mixed": 12}
# What glibc holds beside the tensors of a training on a CPU, in their bytes: 0.28 and 0.36 were measured
# (docs/planning.md). Its memalign, by which torch allocates, finds no use for a hole of just the size asked for.
_HOLES = 0.3


@dataclass(frozen=True)
class Layout:
    """How ranks share a run, in the trainer's words; `recompute`: "full", "selective" or None."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    recompute: str | None = None
    micro_batch: int = 1

    @property
    def ranks(self) -> int:
        """Devices that it needs."""
        return self.tp * self.pp * self.dp

    def settings(self) -> dict[str, Any]:
        """The keys of `trainer` that say so."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "data_parallel_size": self.dp,
            "sequence_parallel": self.sequence_parallel,
            "recompute_granularity": self.recompute,
            "micro_batch_size": self.micro_batch,
        }


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        student: its sizes.
        teacher: of a live one; None without.
        steps, batch, length: steps of `batch` sequences of `length` tokens.
        precision: "32" or "bf16-mixed".
        on_states: whether the loss takes hidden states (`distillation.loss`); else it takes whole logits.
        shared_optimizer: whether data-parallel ranks share the optimizer's states out.
        sequences: of a sample: 2 of a preference pair.
        reference: whether a frozen copy of the first weights is kept beside (preferences).
    """

    student: Architecture
    teacher: Architecture | None
    steps: int
    batch: int
    length: int
    precision: str = "32"
    on_states: bool = False
    shared_optimizer: bool = False
    sequences: int = 1
    reference: bool = False

    @property
    def tokens(self) -> int:
        """Over all steps."""
        return self.steps * self.batch * self.sequences * self.length

    def micro_batches(self, layout: Layout) -> int:
        """Of a step, on each data-parallel rank."""
        return self.batch // (layout.micro_batch * layout.dp)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by what they are for."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All of them, as if they were there at once."""
        return sum(self.parts.values())


def parameters_on_rank(a: Architecture, layout: Layout, stage: int) -> int:
    """Parameters of a rank: its share of its stage's matrices, and whole norms; a tied table is on both ends."""
    h, norm = a.hidden_size, 2 if a.normalization == "LayerNorm" else 1
    norms = 2 * h * norm + (2 * a.kv_channels * norm if a.qk_layernorm else 0)
    layer = (a.layer_parameters() - norms) // layout.tp + norms
    table = padded_rows(a.vocab_size, layout.tp) // layout.tp * h
    first, last = stage == 0, stage == layout.pp - 1
    positions = a.max_position_embeddings * h if a.position_embedding_type == "learned_absolute" else 0
    own = a.num_layers // layout.pp * layer
    own += table + positions if first else 0
    own += h * norm if last else 0
    if last and not (first and a.share_embeddings_and_output_weights):
        own += table
    return own


def kept_values(a: Architecture, layout: Layout) -> float:
    """Values that one layer keeps of a token for its backward pass, on a rank.

    Of each norm its input and what it makes of it, of LayerNorm also that before the weight; merged q, k, v and,
    rotated, q and k; the context of attention as its kernel and as the next product has it; both halves of the MLP's
    first product, what the activation makes and what the gate makes of it.
    """
    norms = 4 if a.normalization == "RMSNorm" else 6
    whole = norms * a.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    attention = 4 * a.query_size + 3 * a.key_value_size
    if layout.recompute == "selective":  # the kernel's own context is made again
        attention -= a.query_size
    mlp = (4 if a.gated_linear_unit else 3) * a.ffn_hidden_size
    return whole + (attention + mlp) / layout.tp


def _activations(t: Training, layout: Layout, stage: int) -> float:
    """Bytes kept of all microbatches that a stage has begun and not ended, and what the backward pass adds."""
    a, bytes_ = t.student, _VALUE[t.precision]
    tokens = layout.micro_batch * t.sequences * t.length
    waiting = min(layout.pp - stage, t.micro_batches(layout))
    layers = a.num_layers // layout.pp
    boundary = a.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    layer = kept_values(a, layout)
    kept = waiting * layers * (boundary if layout.recompute == "full" else layer)
    working = layer if layout.recompute == "full" else 0.0
    # Gradients of the MLP's activations, the widest that are there at once.
    working += (2 if a.gated_linear_unit else 1) * a.ffn_hidden_size / layout.tp + 2 * a.hidden_size
    return tokens * bytes_ * (kept + working)


def _loss(t: Training, layout: Layout, *, cuda: bool) -> float:
    """Bytes of the output layer's part of a step: logits of a chunk or of all tokens, and the table's gradient."""
    a, bytes_ = t.student, _VALUE[t.precision]
    tokens = layout.micro_batch * t.sequences * t.length
    columns = padded_rows(a.vocab_size, layout.tp) // layout.tp
    head = columns * a.hidden_size * _GRADIENT
    if not t.on_states:
        return float(tokens * columns * (4 if bytes_ == 4 else 4 + 2 * bytes_) + head)
    device = torch.device("cuda" if cuda else "cpu")
    buffers = 2 if t.teacher is not None else 1
    chunk = chunk_tokens(tokens, columns, buffers, 4, default_chunk_bytes(device), device)
    hidden = a.hidden_size + (t.teacher.hidden_size if t.teacher else 0)
    return float(chunk * columns * buffers * 4 + head + tokens * hidden * bytes_)


def _waiting_states(t: Training, layout: Layout, stage: int) -> float:
    """Bytes of the teacher's states that its own schedule leaves on the last stage before each step."""
    if t.teacher is None or layout.pp == 1 or stage < layout.pp - 1:
        return 0.0
    share = layout.tp if layout.sequence_parallel else 1
    return t.batch // layout.dp * t.length * t.teacher.hidden_size / share * _VALUE[t.precision]


def training_memory(t: Training, layout: Layout, *, cuda: bool = True) -> Memory:
    """Of the fullest pipeline stage.

    Args:
        cuda: whether a GPU trains; on CPUs the loss's chunks are smaller, and the C library holds more than is in use.
    """
    return max((_stage_memory(t, layout, stage, cuda) for stage in range(layout.pp)), key=lambda m: m.total)


def _stage_memory(t: Training, layout: Layout, stage: int, cuda: bool) -> Memory:
    own, value = parameters_on_rank(t.student, layout, stage), _VALUE[t.precision]
    sharing = layout.dp if t.shared_optimizer else 1
    teacher = 0 if t.teacher is None else parameters_on_rank(t.teacher, layout, stage) * value
    parts = {
        "weights": own * value * (2 if t.reference else 1),
        "gradients": own * _GRADIENT,
        "optimizer": own * _STATES[t.precision] / sharing,
        "activations": _activations(t, layout, stage),
        "loss": _loss(t, layout, cuda=cuda) if stage == layout.pp - 1 else 0.0,
        "teacher": teacher,
        "waiting_states": _waiting_states(t, layout, stage),
    }
    return Memory(parts if cuda else {**parts, "allocator": _HOLES * sum(parts.values())})


def forward_memory(models: list[Architecture], layout: Layout, tokens: int, precision: str = "32") -> Memory:
    """Of passes without gradients.

    Args:
        models: that are there at once.
        tokens: of a microbatch, whose logits are made.
    """
    value = _VALUE[precision]
    rows = [padded_rows(a.vocab_size, layout.tp) // layout.tp for a in models]
    widest = max(kept_values(a, layout) for a in models)
    weights = max(sum(parameters_on_rank(a, layout, s) for a in models) for s in range(layout.pp)) * value
    return Memory(
        {
            "weights": weights,
            "activations": tokens * widest * value,
            "loss": tokens * max(rows) * (4 if value == 4 else 4 + value),
        }
    )


def streamed_memory(models: list[Architecture], layout: Layout, tokens: int, precision: str = "32") -> Memory:
    """Of passes a layer at a time: a model of one layer, that layer as it was read, and the next one.

    Args:
        models: one after the other.
        tokens: of a microbatch.
    """
    made = []
    for a in models:
        memory = forward_memory([a.replace(num_layers=1)], layout, tokens, precision)
        fetched = 2.0 * a.layer_parameters() * _VALUE[precision]
        made.append(Memory({**memory.parts, "fetched": fetched}))
    return max(made, key=lambda memory: memory.total)
