"""Losses of every training step, in a file that survives kills."""

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.files import read_steps, write_text
from nemo_minitron.nemo.proven_checkpoints import describe_step
from nemo_minitron.progress import end_if_asked, track


class StepLog(pl.Callback):
    """Writes a JSON line for each step and each validation (rank 0): `step`, `split`, `loss` in nats a token, and more:
    of a step `seconds` (data and validation apart), `tokens_per_s` over all ranks, `peak_rss_gib` of rank 0, and with
    CUDA `peak_cuda_gib`. The trainer's loggers get the same.

    A run that goes on after it was killed drops the lines of the steps that it repeats.

    Args:
        path: of a JSONL file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: dict[str, dict[str, float]] = {}
        self._begin = time.monotonic()

    def add(self, split: str, parts: dict[str, float]) -> None:
        """Say what else the line of the running step or validation holds."""
        self._parts.setdefault(split, {}).update(parts)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        if rank() == 0:
            kept = [entry for entry in read_steps(self.path) if entry["step"] < trainer.global_step]
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's hook."""
        self._begin = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook; the optimizer has stepped.

        Raises:
            FloatingPointError: the loss is not finite.
            KeyboardInterrupt: Ctrl-C came, and was lost on its way.
        """
        end_if_asked()
        step, loss = trainer.global_step - 1, float(trainer.callback_metrics["reduced_train_loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"{describe_step(step)}: the loss is {loss}")
        tokens = self._parts.get("train", {}).get("tokens")
        self.add("train", measured(time.monotonic() - self._begin, tokens))
        self._write(trainer, "train", step, loss)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        if trainer.training or trainer.validating:
            step = max(trainer.global_step - 1, 0)
            self._write(trainer, "valid", step, float(trainer.callback_metrics["val_loss"]))

    def _write(self, trainer: Any, split: str, step: int, loss: float) -> None:
        figures = {"loss": loss, **self._parts.pop(split, {})}
        self.write(split, step, figures)
        track(trainer.loggers, split, step, figures)

    def write(self, split: str, step: int, parts: dict[str, float]) -> None:
        """Append a line."""
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **parts}) + "\n")


def measured(seconds: float, tokens: float | None = None) -> dict[str, float]:
    """What a step of so many seconds took, for its line; `tokens` over all ranks."""
    found = {"seconds": round(seconds, 4), "peak_rss_gib": peak_rss_gib()}
    if tokens is not None and seconds > 0:
        found["tokens_per_s"] = round(tokens / seconds, 1)
    if torch.cuda.is_initialized():
        found["peak_cuda_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return found


class TokenRate(pl.Callback):
    """Tokens a second in the progress bar, over the steps of this process after its first, which warms up.

    Args:
        tokens: of a step, over all ranks.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens, self._steps, self._begin = tokens, 0, 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        now = time.monotonic()
        if self._steps:
            rate = self._tokens * self._steps / (now - self._begin)
            pl_module.log("tokens_per_s", round(rate, 1), prog_bar=True, rank_zero_only=True, batch_size=1)
        else:
            self._begin = now
        self._steps += 1
