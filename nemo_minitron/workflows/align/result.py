"""What alignment recipes write into result.json."""

from pathlib import Path
from typing import Any

from nemo_minitron.alignment.prepared import STEPS, Prepared
from nemo_minitron.checkpoints.origin import absolute
from nemo_minitron.checkpoints.source import CHECKPOINT
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.files import read_steps


def summary(r: Any, prepared: Prepared, directory: Path, metrics: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of `result.json` that all alignment recipes have.

    Args:
        metrics: further ones of a validation.
    """
    t = prepared.trainer
    valid = [line for line in read_steps(directory / STEPS) if line["split"] == "valid"]
    return {
        "student": absolute(r.student),
        "params": prepared.student.architecture.parameters(),
        "peft": r.align.peft,
        "steps": t.max_steps,
        "global_batch_size": t.global_batch_size,
        "seed": r.seed,
        "valid_loss_nats_before": valid[0]["loss"],
        "valid_loss_nats_after": valid[-1]["loss"],
        **{f"valid_{name}_after": valid[-1][name] for name in metrics},
        **_counts(prepared),
        "ranks": t.ranks,
        "tensor_model_parallel_size": t.tensor_model_parallel_size,
        "pipeline_model_parallel_size": t.pipeline_model_parallel_size,
        "data_parallel_size": t.data_parallel_size,
        "peak_rss_gib": peak_rss_gib(),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }


def _counts(prepared: Prepared) -> dict[str, int]:
    return {
        f"{name}_{key}": value
        for name, split in (("train", prepared.train), ("valid", prepared.valid))
        for key, value in split.to_config().items()
        if key != "path"
    }
