"""A run of NeMo-Aligner in a run directory: its configuration, its trainer, its checkpoints, its log."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.alignment.model_config import model_config, run_config
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.align import AlignConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.tokenizer import as_version_4
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.files import read_steps
from nemo_minitron.padding import padded_rows
from nemo_minitron.progress import end_if_asked

ALIGNER = "aligner"
_MEGATRONS = "mcore_distributed_optim"
# Aligner reads all three back from the name when it resumes; one that is absent counts as 0.
_NAME = "{step}-{consumed_samples}-{epoch}"


def aligner_config(
    source: Source,
    t: TrainerConfig,
    a: AlignConfig,
    *,
    key: str,
    directory: Path,
    tokenizer: str,
    seq_length: int,
    max_epochs: int,
    seed: int,
    cuda: bool,
    fused: bool,
    data: dict[str, Any],
) -> DictConfig:
    """The configuration that NeMo-Aligner's scripts have, for one run.

    Args:
        key: of the algorithm's part, "sft" or "dpo".
        directory: the run's.
        tokenizer: a Hugging Face directory.
        seq_length: the context in tokens.
        cuda, fused: see `run_config`.
        max_epochs: passes over the data that are begun at most; `t.max_steps` ends them.
        data: `model.data`.
    """
    optimizer = _optim(a, t, cuda=cuda, fused=fused)
    return OmegaConf.create(
        {
            "trainer": _trainer(t, a, key, max_epochs, optimizer, cuda=cuda),
            "exp_manager": _exp_manager(directory, save_nemo=a.save_nemo),
            "model": {
                **model_config(source.architecture, seq_length, str(as_version_4(tokenizer))),
                **run_config(t, cuda=cuda, fused=fused),
                "override_vocab_size": padded_rows(
                    source.architecture.vocab_size, t.tensor_model_parallel_size
                ),
                "seed": seed,
                "answer_only_loss": True,
                "peft": _peft(a),
                "optim": optimizer,
                "data": data,
            },
        }
    )


def _trainer(
    t: TrainerConfig, a: AlignConfig, key: str, max_epochs: int, optimizer: dict[str, Any], *, cuda: bool
) -> dict[str, Any]:
    """Lightning's trainer, and under `key` Aligner's."""
    steps = {"max_epochs": max_epochs, "max_steps": t.max_steps}
    # Megatron's optimizer clips in its step by Lightning's setting, and fails on none; Aligner clips for the others.
    clips = {"gradient_clip_val": a.optim.clip_grad} if optimizer["name"] == _MEGATRONS else {}
    return {
        "accelerator": "gpu" if cuda else "cpu",
        "devices": t.ranks // t.num_nodes,
        "num_nodes": t.num_nodes,
        "precision": 32 if t.precision == "32" else t.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **clips,
        **steps,
        key: {
            **steps,
            "val_check_interval": t.val_check_interval,
            "save_interval": t.val_check_interval,
            "limit_val_batches": t.limit_val_batches,
            "gradient_clip_val": a.optim.clip_grad,
        },
    }


def _exp_manager(directory: Path, *, save_nemo: bool) -> dict[str, Any]:
    return {
        "explicit_log_dir": str((directory / ALIGNER).resolve()),
        "create_tensorboard_logger": False,
        "create_checkpoint_callback": True,
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "log_tflops_per_sec_per_gpu": False,
        "checkpoint_callback_params": {
            "monitor": "val_loss",
            "mode": "min",
            "save_top_k": 1,
            "save_nemo_on_train_end": save_nemo,
            "filename": _NAME,
        },
    }


def _optim(a: AlignConfig, t: TrainerConfig, *, cuda: bool, fused: bool) -> dict[str, Any]:
    o = a.optim
    # See `cpu_compat.aligner.adamw_step_cannot_be_sharded`. Main weights beside 16-bit ones are Megatron's.
    plain = not cuda or (not fused and t.precision == "32")
    return {
        "name": "sharded_adamw" if plain else _MEGATRONS,
        "lr": o.lr,
        "weight_decay": o.weight_decay,
        "betas": [o.adam_beta1, o.adam_beta2],
        "sched": {
            "name": "CosineAnnealing",
            "warmup_steps": o.warmup_steps,
            "constant_steps": 0,
            "min_lr": o.min_lr,
            "max_steps": t.max_steps,
        },
    }


def _peft(a: AlignConfig) -> dict[str, Any]:
    return {
        "peft_scheme": a.peft,
        "restore_from_path": None,
        "lora_tuning": {
            "adapter_dim": a.lora.dim,
            "alpha": a.lora.alpha or a.lora.dim,
            "adapter_dropout": a.lora.dropout,
            "target_modules": list(a.lora.target_modules),
            "variant": "nemo",
            "column_init_method": "xavier",
            "row_init_method": "zero",
            "layer_selection": None,
            "weight_tying": False,
            "position_embedding_strategy": None,
        },
    }


def keep_one_checkpoint(directory: Path) -> None:
    """Leave the newest finished checkpoint to resume from, where a kill left more than that or half of one.

    NeMo's `check_resume` (exp_manager.py, nemo_toolkit@2.4.1) refuses two of them, and one that is unfinished.

    Args:
        directory: the run's.
    """
    saved = directory / ALIGNER / "checkpoints"
    for marker in saved.glob("*-unfinished"):
        name = marker.name.removesuffix("-unfinished")
        for half in (saved / name, *saved.rglob(f"{name}.ckpt"), marker):
            _remove(half)
    # With adapters each model-parallel rank has a file of its own.
    finished = [*saved.glob("*-last"), *saved.rglob("*-last.ckpt")]
    newest = max(map(_step, finished), default=0)
    for older in finished:
        if _step(older) < newest:
            _remove(older)


def _step(checkpoint: Path) -> int:
    found = re.search(r"step=(\d+)", checkpoint.name)
    return int(found.group(1)) if found else -1


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class RunLog:
    """Aligner's logger over a JSONL file: a line for each step and each validation (rank 0).

    Args:
        path: of the file.
        write: whether this rank writes it.
        done: steps that were done when the run began; lines of steps that are repeated go.

    Attributes:
        follow: called with split, step and figures of each line, on every rank.
    """

    def __init__(self, path: Path, *, write: bool, done: int) -> None:
        self.path, self._write = path, write
        self.follow: Callable[[str, int, dict[str, Any]], None] = lambda split, step, figures: None
        if write:
            keep_done(path, done)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None, prefix: str = "") -> None:
        """Called by Aligner's trainers.

        Raises:
            KeyboardInterrupt: Ctrl-C came, and was lost on its way.
            FloatingPointError: the loss is not finite; the checkpoint before it is the last.
        """
        end_if_asked()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"step {step}: the loss is {metrics['loss']}; the last checkpoint is kept"
            )
        split = {"train/": "train", "val/": "valid"}[prefix]
        if split == "train":
            metrics = {**metrics, **_timed(metrics), "peak_rss_gib": peak_rss_gib()}
        self.follow(split, step or 0, metrics)
        if self._write:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")

    def finalize(self) -> None:
        """Called by Aligner's trainers."""


def _timed(metrics: dict[str, Any]) -> dict[str, float]:
    """Of a step of Aligner's that says how long it took, and how many tokens it learned from."""
    seconds, tokens = metrics.get("step_time"), metrics.get("tokens")
    found = {} if seconds is None else {"seconds": seconds}
    return {**found, "tokens_per_s": round(tokens / seconds, 1)} if tokens and seconds else found


def keep_done(path: Path, done: int) -> None:
    """Leave a JSONL file the lines of what was done when a run goes on; without such lines it goes.

    Args:
        path: of lines with a `step`, and a `split` unless all are a validation's.
        done: steps.
    """
    kept = [line for line in read_steps(path) if _before(line, done)]
    if kept:
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    else:
        path.unlink(missing_ok=True)


def _before(line: dict[str, Any], done: int) -> bool:
    # Training steps count from 0, validations say after how many of them; the first one precedes all steps.
    return done > 0 and bool(line["step"] < done + (line.get("split", "valid") == "valid"))
