"""How many tokens of each training step counted in its loss, and that it was all of them."""

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.errors import FailedRun
from nemo_minitron.nemo.proven_checkpoints import describe_step
from nemo_minitron.nemo.step_log import StepLog


class CountingReduction(MaskedTokenLossReduction):
    """NeMo's mean over the global batch's tokens, which also tells their number, `tokens`; on the last stage."""

    tokens = 0.0

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """NeMo's hook."""
        counts = [each["loss_sum_and_ub_size"][1].double() for each in losses_reduced_per_micro_batch]
        total = torch.stack(counts).sum()
        parallel.all_reduce(total, "dp")
        self.tokens = float(parallel.all_reduce(total, "cp"))
        return super().reduce(losses_reduced_per_micro_batch)


class CountedTokens(pl.Callback):
    """Writes each step's `tokens` into its line of the step log, and ends a run in which one did not count.

    Packed text has no padding and no prompts: every token of the global batch counts. A mask that has lost some
    would train on the rest without a word.

    Args:
        steps: the log.
        expected: tokens of a global batch; None where only some count, as many as its conversations' answers have.
    """

    def __init__(self, steps: StepLog, expected: int | None) -> None:
        self.steps, self.expected = steps, expected

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning's hook. A distillation's reduction, which is in place by now, counts by itself."""
        self.trainer = trainer
        if not hasattr(pl_module.training_loss_reduction, "tokens"):
            pl_module._training_loss_reduction = CountingReduction()

    def on_megatron_step_end(self, reduced: Tensor) -> None:
        """NeMo's hook; the optimizer has not stepped. Every rank hears the number of the last stage.

        Raises:
            FailedRun: names it and the expected one.
        """
        if not self.trainer.training:
            return
        reduction = self.trainer.lightning_module.training_loss_reduction
        counted = torch.tensor(float(reduction.tokens), dtype=torch.float64, device=reduced.device)
        tokens = int(parallel.broadcast_pp(counted, parallel.pp_size() - 1))
        self.steps.add("train", {"tokens": tokens})
        if tokens != (self.expected or max(tokens, 1)):
            raise FailedRun(
                f"{describe_step(self.trainer.global_step)}: {tokens} tokens counted in the loss, expected "
                f"{self.expected or 'some'} (trainer.global_batch_size x data.seq_length)"
            )
