"""DistillTransform in a nemo.lightning script, with a record of what it saw and said.

    recorded_distillation.py STUDENT TEACHER TRAIN_PREFIX OUTPUT

OUTPUT/batches.pt: each step's tokens, labels [b, s] and loss mask; OUTPUT/steps.json: what the transform reported;
OUTPUT/teacher.json: what became of the teacher's weights.
"""

import json
import sys
from pathlib import Path

from nemo_minitron import cpu_compat

cpu_compat.prepare_nemo()

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.lightning.io import load_context

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.data.datasets import never_padded
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.nemo.distill_transform import DistillTransform

STEPS = 2
said: list[dict[str, float]] = []


class Recorder(pl.Callback):
    """Keeps the microbatches."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_megatron_microbatch_start(self, batch: dict[str, torch.Tensor]) -> None:
        """NeMo's hook."""
        self.seen.append({name: batch[name].clone() for name in ("tokens", "labels", "loss_mask")})


def hear(split: str, parts: dict[str, float]) -> None:
    said.append({"split": split, **parts})


def fate(
    before: dict[str, torch.Tensor], teacher: torch.nn.Module, student: torch.nn.Module
) -> dict[str, bool]:
    own = {id(p) for p in student.parameters()}
    found = dict(teacher.named_parameters())
    return {
        "unchanged": all(torch.equal(before[name], p) for name, p in found.items()),
        "gradients": any(p.requires_grad or p.grad is not None for p in found.values()),
        "buffers": any(hasattr(p, "main_grad") for p in found.values()),
        "shared": any(id(p) in own for p in found.values()),
    }


def main(student: str, teacher: str, train: str, output: str) -> None:
    model = load_context(Path(student) / "context", "model")
    data = llm.PreTrainingDataModule(
        paths={"train": [train], "validation": [train], "test": [train]},
        seq_length=model.config.seq_length,
        tokenizer=model.tokenizer,
        micro_batch_size=4,
        global_batch_size=8,
        num_workers=0,
        split=None,
    )
    never_padded(data)
    recorder = Recorder()
    loaded: dict[str, torch.Tensor] = {}

    def keep(chunks: list[torch.nn.Module]) -> None:
        loaded.update({name: p.clone() for name, p in chunks[0].named_parameters()})

    transform = DistillTransform(find_source(teacher), LossSettings(), on_step=hear, on_loaded=keep)
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=nl.MegatronStrategy(
            pipeline_dtype=torch.float32, replace_progress_bar=False, ckpt_async_save=False
        ),
        callbacks=[transform],
        max_steps=STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
    )
    trainer.callbacks.append(recorder)
    llm.train(
        model,
        data,
        trainer,
        log=nl.NeMoLogger(
            explicit_log_dir=f"{output}/nemo",
            ckpt=nl.ModelCheckpoint(save_last=True, save_top_k=0, save_context_on_train_end=True),
        ),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=student, load_optim_state=False)),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-3, use_distributed_optimizer=False)),
    )
    torch.save(recorder.seen, f"{output}/batches.pt")
    Path(output, "steps.json").write_text(json.dumps(said))
    assert transform.teacher is not None
    Path(output, "teacher.json").write_text(json.dumps(fate(loaded, transform.teacher.chunk, model)))


if __name__ == "__main__":
    main(*sys.argv[1:])
