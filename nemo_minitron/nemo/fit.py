"""Training with NeMo in a run directory: checkpoints, resuming, and what the run leaves behind."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from nemo_minitron import parallel
from nemo_minitron.checkpoints.source import CHECKPOINT, is_unfinished
from nemo_minitron.checkpoints.true_rows import cut_padding
from nemo_minitron.checkpoints.untrusted import weights_may_only_be_tensors
from nemo_minitron.config.logger import LoggerConfig
from nemo_minitron.environment import rank
from nemo_minitron.files import remove_stale
from nemo_minitron.nemo.preemption import SaveAndEnd
from nemo_minitron.nemo.proven_checkpoints import ProvenCheckpoint, describe_step, is_not_finite
from nemo_minitron.nemo.step_log import TokenRate
from nemo_minitron.nemo.trackers import trackers


def fit(
    model: Any,
    data: Any,
    trainer: Any,
    directory: Path,
    *,
    save_every_n_steps: int,
    start: Path | None = None,
    new_parameters: bool = False,
    logger: LoggerConfig | None = None,
) -> Path:
    """Train with `nemo.collections.llm.train`, or resume a run that was killed; SIGUSR1 saves and ends it.

    Args:
        model: a NeMo 2 GPTModel with its optimizer.
        data: a NeMo data module.
        trainer: of `nemo_minitron.nemo.trainer`.
        directory: the run's; NeMo writes into `directory/nemo`.
        save_every_n_steps: steps between checkpoints; the last step is always saved.
        start: weights to begin with (a NeMo 2 directory), unless the run has a checkpoint of its own.
        new_parameters: whether the model has parameters that `start` lacks; they keep the values that they have.
        logger: where the figures of each step also go.

    Returns:
        The last checkpoint, which RUN/checkpoint now names too.

    Raises:
        FloatingPointError: a loss or a gradient that is not finite, with the step and its samples; the last good
            checkpoint is kept.
        InterruptedRun: the signal came; the checkpoint is saved.
    """
    from megatron.core.dist_checkpointing.validation import StrictHandling

    # Last, so that others have done their part of the step; not through the constructor, see `trainer.trainer`.
    trainer.callbacks.append(SaveAndEnd())
    trainer.callbacks.append(TokenRate(data.global_batch_size * data.seq_length))
    foreign = start is not None and not _checkpoints(directory)
    if foreign and new_parameters:
        trainer.strategy.ckpt_load_strictness = StrictHandling.LOG_UNEXPECTED
    with weights_may_only_be_tensors() if foreign else contextlib.nullcontext():
        log = _logger(directory, save_every_n_steps, trackers(logger or LoggerConfig(), directory))
        _train(model, data, trainer, log, _resume(directory, start))
    return _name_last(directory, model.config.vocab_size)


def _name_last(directory: Path, vocab_size: int) -> Path:
    """RUN/checkpoint names the last checkpoint, which is returned."""
    last, link = last_checkpoint(directory), directory / CHECKPOINT
    if rank() == 0:
        cut_padding(last / "weights", vocab_size)
        remove_stale(link)
        link.symlink_to(os.path.relpath(last, directory), target_is_directory=True)
    parallel.barrier()
    return last


def finish(session: Any, directory: Path, dtype: str) -> None:
    """Leave what a training ends with, weights alone, as RUN/checkpoint; every rank makes this call.

    The state that a resumed run needs (masters, optimizer) stays in RUN/nemo/checkpoints.

    Args:
        session: the last checkpoint, opened and rounded to the dtype.
        directory: the run's.
        dtype: of the weights, in torch's word.
    """
    final, link = directory / "nemo" / "final", directory / CHECKPOINT
    session.save(final, dtype)
    if rank() == 0:
        remove_stale(link)
        link.symlink_to(os.path.relpath(final, directory), target_is_directory=True)
    parallel.barrier()


def _train(model: Any, data: Any, trainer: Any, log: Any, resume: Any) -> None:
    """What `nemo.collections.llm.train` does with these arguments, of `nemo.lightning` alone: its module imports
    ModelOpt and a dozen more, 4 s on each rank. A checkpoint with ModelOpt's state is left to NeMo's."""
    from nemo.lightning import configure_no_restart_validation_training_loop

    try:
        configure_no_restart_validation_training_loop(trainer)
        log.setup(trainer, resume_if_exists=resume.resume_if_exists)
        resume.setup(trainer, model)
        trainer.fit(model, data)
    except RuntimeError as error:
        if not is_not_finite(error):
            raise
        raise FloatingPointError(f"{describe_step(trainer.global_step)}: a gradient is not finite") from error


def _logger(directory: Path, every_n_steps: int, found: dict[str, Any]) -> Any:
    import nemo.lightning as nl

    checkpoints = ProvenCheckpoint(
        every_n_train_steps=every_n_steps,
        filename="{step}",
        # Without it the save at the last step leaves the optimizer out, and resuming fails with a KeyError.
        save_optim_on_train_end=True,
        save_context_on_train_end=True,
        always_save_context=True,
    )

    class Logger(nl.NeMoLogger):  # type: ignore[misc]
        """Goes on in the files of an earlier start; NeMo moves those to run_0, run_1 and so on, four a start."""

        def _setup_files_to_move(self, log_dir: Path, app_state: Any) -> None:
            app_state.files_to_move, app_state.files_to_copy = [], None

    return Logger(
        explicit_log_dir=str(directory / "nemo"), ckpt=checkpoints, update_logger_directory=False, **found
    )


def _resume(directory: Path, start: Path | None) -> Any:
    import nemo.lightning as nl

    class Resume(nl.AutoResume):
        """Begins anew where a kill came while the first checkpoint was being written, which NeMo's own refuses; of two
        it takes the one of more steps, NeMo's the one of the later date."""

        def _find_trainer_ckpt_path(self) -> Path | None:
            return last_checkpoint(directory) if _checkpoints(directory) else None

    return Resume(
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
        resume_from_directory=str(directory / "nemo" / "checkpoints"),
        # load_artifacts would instantiate what the checkpoint's context names.
        restore_config=nl.RestoreConfig(path=str(start), load_optim_state=False, load_artifacts=False)
        if start
        else None,
    )


def _checkpoints(directory: Path) -> list[Path]:
    found = (directory / "nemo" / "checkpoints").glob("*-last")
    return [p for p in found if (p / "context").is_dir() and not is_unfinished(p)]


def last_checkpoint(directory: Path) -> Path:
    """The newest finished checkpoint of a training run (`*-last`)."""
    found = _checkpoints(directory)
    assert found, f"{directory}: NeMo left no checkpoint"
    # By the steps in the name: a clock that was set back dates a newer one before an older.
    return max(found, key=lambda p: [int(number) for number in re.findall(r"\d+", p.name)])
