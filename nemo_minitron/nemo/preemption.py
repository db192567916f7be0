"""A training run that is told to end saves a checkpoint first, with NeMo's callback, and says so with its exit code."""

import signal
from typing import Any

from nemo.lightning.pytorch.callbacks.preemption import PreemptionCallback

from nemo_minitron.errors import InterruptedRun


class SaveAndEnd(PreemptionCallback):
    """At SIGUSR1 or SIGTERM, with which SLURM says that the end is near, saves after the running step.

    NeMo's callback then ends with exit code 0, which SLURM takes for success: jobs that depend on this one would start
    with half a student. And Lightning, at SIGTERM, ends each rank after whatever step it happens to be in.
    """

    def __init__(self) -> None:
        super().__init__(sig=signal.SIGUSR1)
        self._lightning: Any = None
        self._waited = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        super().on_train_start(trainer, pl_module)
        self._lightning = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGUSR1))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        super().on_train_end(trainer, pl_module)
        signal.signal(signal.SIGTERM, self._lightning)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook; every rank learns from rank 0 whether a signal came.

        Raises:
            InterruptedRun: it came, and the checkpoint is whole.
        """
        said = InterruptedRun(f"interrupted: a checkpoint was saved after step {trainer.global_step - 1}")
        # After a step that is saved anyway NeMo would save again, and fail at the files of the first time. The end can
        # wait for the next step: the validation that is due now is in the record of an undisturbed run, too.
        if trainer.checkpoint_callback._last_global_step_saved == trainer.global_step:
            if self.interrupted:
                if self._waited:
                    raise said
                self._waited = True
            return
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        except SystemExit:
            raise said from None
