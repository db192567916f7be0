"""Checkpoints of a training that may go wrong: what stays is the last one that is known to be good."""

import contextlib
import math
import shutil
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from nemo.lightning.ckpt_utils import ckpt_to_dir

from nemo_minitron import parallel
from nemo_minitron.environment import rank

# Megatron-core's check of gradients (0.13.1, distributed/param_and_grad_buffer.py), which knows of no step.
_IN_GRADIENTS = "in local grad norm"


def describe_step(step: int) -> str:
    """What a training step, counted from 0, was made of."""
    size = get_current_global_batch_size()
    return f"step {step}, samples {step * size} to {(step + 1) * size - 1} of the training data's order"


def is_not_finite(error: BaseException) -> bool:
    """Whether an exception says that a loss or a gradient was NaN or infinite."""
    return isinstance(error, FloatingPointError) or (
        isinstance(error, RuntimeError) and _IN_GRADIENTS in str(error)
    )


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Keep SIGTERM and SIGUSR1 until the end, for this process and those that it starts meanwhile.

    SLURM sends its signals to every process of a job, and more than once: a process that helps to save would die of
    them, and the checkpoint with it.
    """
    # Started inside, Python's resource tracker would let SIGTERM through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProvenCheckpoint(nl.ModelCheckpoint):
    """NeMo's checkpoints, the last one only; each stays until the weights of the next have given a finite loss.

    A checkpoint is written right after an optimizer step, and whether that step was a good one is known with the next
    loss, of training or validation. Where that is not finite, the checkpoint is deleted and the one before it is the
    last again.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_top_k=0, save_last=True, **options)
        self._unproven = False
        self._superseded: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook. A kill may have come between a checkpoint and its proof: the one before it still stands."""
        super().on_train_start(trainer, pl_module)
        if self.last_model_path:
            last = ckpt_to_dir(self.last_model_path).name
            self._superseded = [str(p) for p in Path(self.dirpath).glob("*-last") if p.name != last]
            self._unproven = bool(self._superseded)

    def _should_remove_checkpoint(self, trainer: Any, previous: str, current: str) -> bool:
        if super()._should_remove_checkpoint(trainer, previous, current):
            self._superseded.append(previous)
        return False

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        with signals_wait():
            super()._save_last_checkpoint(trainer, monitor_candidates)
        self._unproven = True

    def _prove(self, trainer: Any) -> None:
        """The weights as they were saved have given a finite loss."""
        self._unproven = False
        while self._superseded:
            self._remove_checkpoint(trainer, self._superseded.pop())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's hook; a run that goes on validates after the same steps as one that was not interrupted.

        The checkpoint is written before Lightning counts its step as done, and what it restores of its counters is
        then one step short. There is one epoch, so both count the steps from the first one on.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.total.ready = progress.current.ready = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook; the optimizer has stepped.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = float(trainer.callback_metrics["reduced_train_loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"{describe_step(trainer.global_step - 1)}: the loss is {loss}")
        self._prove(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = float(trainer.callback_metrics["val_loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{describe_step(trainer.global_step - 1)}: after it the validation loss is {loss}"
            )
        self._prove(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook. No loss may follow the last checkpoint; that its weights are finite has to do then."""
        super().on_train_end(trainer, pl_module)
        if self._superseded:
            finite = torch.stack([p.isfinite().all() for p in pl_module.parameters()]).all()
            if parallel.true_everywhere(finite):
                self._prove(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning's hook. Rank 0 acts alone: others may wait for it in a collective."""
        if is_not_finite(exception) and self._unproven and rank() == 0:
            self.set_checkpoint_unfinished_marker(self.last_model_path)
            shutil.rmtree(ckpt_to_dir(self.last_model_path), ignore_errors=True)
            self.remove_checkpoint_unfinished_marker(self.last_model_path)
