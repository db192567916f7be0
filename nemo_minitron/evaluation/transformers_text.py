"""How a model of transformers predicts held-out text: the same figures as a sharded model's, on the same sequences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.evaluation.lm_figures import LMFigures, figures_of
from nemo_minitron.evaluation.lm_loss import stacked

# Positions whose logits, [block, v] float32, are held at once beside the model's own.
_BLOCK = 512


def transformers_figures(
    model: Any,
    dataset: Any,
    samples: int,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> LMFigures:
    """Run the first samples through the model, whole sequences under causal attention.

    Args:
        model: of transformers, for language modelling.
        dataset, samples: as for `lm_loss`; items without `attention_mask`.
        batch_size: samples of a forward pass.
        progress: told how many samples are done.
    """
    sums = torch.zeros(3, samples, dtype=torch.float64)
    for begin in range(0, samples, batch_size):
        numbers = list(range(begin, min(begin + batch_size, samples)))
        batch = stacked([dataset[i] for i in numbers], model.device)
        with torch.inference_mode():
            logits = model(input_ids=batch["tokens"], use_cache=False).logits
        for row, number in enumerate(numbers):
            weight = batch["loss_mask"][row].double()
            sums[:, number] = _sums(logits[row], batch["labels"][row], weight).cpu()
        if progress is not None:
            progress(begin + len(numbers))
    return figures_of(sums, teacher=False)


def _sums(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Of a sample, float64 [3]: loss, tokens, right ones.

    Args:
        logits: [s, v].
        labels: int64 [s].
        weight: float64 [s].
    """
    total = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for begin in range(0, len(labels), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        said = logits[part].float()
        losses = torch.nn.functional.cross_entropy(said, labels[part], reduction="none").double()
        right = (said.argmax(1) == labels[part]).double()
        rows = torch.stack([losses, torch.ones_like(losses), right])
        total += (rows * weight[part]).sum(1)
    return total
