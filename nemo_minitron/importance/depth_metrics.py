"""Scores of layers and of contiguous blocks by what a model loses without them: LM loss, accuracy on a task."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.layer_removal import Block, lm_loss_without
from nemo_minitron.evaluation.multiple_choice import Task, accuracy_and_margin, choice_losses

METRICS = ("lm_loss", "task")


def lm_loss_scores(
    chunks: Sequence[Any],
    dataset: Any,
    samples: int,
    lengths: Sequence[int] = (1,),
    *,
    micro_batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The LM loss with each layer, or each block of neighbours, left out (arXiv 2407.14679, section 2.2, "PPL").

    Args:
        chunks, dataset, samples, micro_batch_size, progress: as for `evaluation.lm_loss.lm_loss`.
        lengths: of the blocks, in layers; 1 gives the layers' own scores.

    Returns:
        "layers/lm_loss" [num_layers] and, for lengths n > 1, "blocks/lm_loss/<n>" [num_layers - n + 1], by the block's
        first layer: nats, float32, on the CPU, the same on every rank. It is the loss itself, not its rise.

    Raises:
        InputError: an invalid length; NaN or infinity (names the layers that were left out); see `LayerRemoval`.
    """
    blocks = _blocks(_num_layers(chunks), lengths)
    losses = lm_loss_without(
        chunks, dataset, samples, blocks, micro_batch_size=micro_batch_size, progress=progress
    )
    _check_finite(losses, blocks, "LM loss")
    return _by_length("lm_loss", losses[1:], blocks)


def layers_by_loss(losses: Tensor) -> dict[str, Tensor]:
    """Losses [num_layers] without each layer, in nats, as `lm_loss_scores` gives them.

    Raises:
        InputError: NaN or infinity (names the layer).
    """
    blocks = _blocks(len(losses), (1,))
    _check_finite(torch.cat([losses.new_zeros(1), losses]), blocks, "LM loss")
    return _by_length("lm_loss", losses, blocks)


def task_scores(
    chunks: Sequence[Any],
    task: Task,
    lengths: Sequence[int] = (1,),
    *,
    micro_batch_size: int,
    normalize: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The accuracy on a multiple-choice task that is lost with each layer, or each block of neighbours, left out.

    N questions know only N + 1 accuracies, so many layers would tie. Ties are broken by the mean margin m of the right
    choice (`accuracy_and_margin`): with d = m(whole) - m(without), d / (1 + |d|) / (2 N) is added to the lost accuracy,
    which is less than half of the smallest step.

    Args:
        chunks, task, micro_batch_size, normalize, progress: as for `choice_losses`.
        lengths: of the blocks, in layers.

    Returns:
        "layers/task" [num_layers] and, for lengths n > 1, "blocks/task/<n>" [num_layers - n + 1]: float32, on the CPU,
        the same on every rank; below 0 where the model is better without the layers.

    Raises:
        InputError: as `lm_loss_scores`.
    """
    blocks = _blocks(_num_layers(chunks), lengths)
    losses = choice_losses(
        chunks, task, blocks, micro_batch_size=micro_batch_size, normalize=normalize, progress=progress
    )
    _check_finite(losses.sum(1), blocks, "task's loss")
    accuracy, margin = accuracy_and_margin(losses, task)
    lost = margin[0] - margin[1:]
    scores = accuracy[0] - accuracy[1:] + lost / (1 + lost.abs()) / (2 * len(task.answers))
    return _by_length("task", scores, blocks)


def _num_layers(chunks: Sequence[Any]) -> int:
    return chunks[0].config.num_layers


def _blocks(layers: int, lengths: Sequence[int]) -> list[Block]:
    for length in lengths:
        if not 1 <= length <= layers:
            raise InputError(f"block length {length}: must be between 1 and {layers}, the number of layers")
    return [(start, length) for length in sorted(set(lengths)) for start in range(layers - length + 1)]


def _by_length(metric: str, values: Tensor, blocks: list[Block]) -> dict[str, Tensor]:
    scores = {}
    for length in sorted({length for _, length in blocks}):
        name = f"layers/{metric}" if length == 1 else f"blocks/{metric}/{length}"
        chosen = [k for k, (_, n) in enumerate(blocks) if n == length]
        scores[name] = values[chosen].float()
    return scores


def _check_finite(losses: Tensor, blocks: list[Block], what: str) -> None:
    bad = (~torch.isfinite(losses)).nonzero()
    if not len(bad):
        return
    number = int(bad[0])
    if number == 0:
        raise InputError(f"NaN or infinity in the {what} of the whole model")
    start, length = blocks[number - 1]
    left_out = f"layer {start}" if length == 1 else f"layers {start} to {start + length - 1}"
    raise InputError(f"NaN or infinity in the {what} without {left_out}")
