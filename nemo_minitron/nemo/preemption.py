"""A training run that is told to end saves a checkpoint first, with NeMo's callback, and says so with its exit code."""

import signal
from typing import Any

from nemo.lightning.pytorch.callbacks.preemption import PreemptionCallback

from nemo_minitron.errors import InterruptedRun


class SaveAndEnd(PreemptionCallback):
    """At SIGUSR1, the signal that launchers send ahead of the end, saves after the running step.

    NeMo's callback then ends with exit code 0, which SLURM takes for success: jobs that depend on this one would start
    with half a student.
    """

    def __init__(self) -> None:
        super().__init__(sig=signal.SIGUSR1)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook; every rank learns from rank 0 whether the signal came.

        Raises:
            InterruptedRun: it came, and the checkpoint is whole.
        """
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        except SystemExit:
            raise InterruptedRun(f"interrupted: a checkpoint was saved after step {trainer.global_step - 1}") from None
