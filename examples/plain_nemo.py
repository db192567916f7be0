# plain_nemo.py
"""Score, plan, prune and train with nemo.lightning alone: plain_nemo.py CHECKPOINT TRAIN_PREFIX VALID_PREFIX OUTPUT.

CHECKPOINT is a NeMo 2 directory, the prefixes name Megatron's .bin and .idx files.
"""

import sys
from pathlib import Path

from nemo_minitron import cpu_compat

cpu_compat.prepare_nemo()  # before NeMo is imported; does nothing where there is CUDA

import nemo.lightning as nl
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.lightning.io import load_context

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.data.datasets import never_padded
from nemo_minitron.nemo.importance_callback import ImportanceCallback
from nemo_minitron.nemo.prune_transform import PruneTransform
from nemo_minitron.pruning import make_plan, resolve_target


def trainer(callback, *, strategy=None, **options) -> nl.Trainer:
    return nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        strategy=nl.MegatronStrategy(
            pipeline_dtype=torch.float32, replace_progress_bar=False, ckpt_async_save=False, **strategy or {}
        ),
        callbacks=[callback],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        **options,
    )


def main(checkpoint: str, train: str, valid: str, output: str) -> None:
    model = load_context(Path(checkpoint) / "context", "model")
    data = llm.PreTrainingDataModule(
        paths={"train": [train], "validation": [train], "test": [valid]},
        seq_length=model.config.seq_length,
        tokenizer=model.tokenizer,
        micro_batch_size=4,
        global_batch_size=8,
        num_workers=0,
        split=None,
    )
    never_padded(data)
    resume = nl.AutoResume(restore_config=nl.RestoreConfig(path=checkpoint, load_optim_state=False))

    # 32 sequences through the teacher: 4 batches of 8, without gradient buffers and optimizer.
    source = find_source(checkpoint)
    importance = ImportanceCallback(f"{output}/scores.safetensors", source_sha256=source.sha256())
    buffers = {"ddp": "pytorch", "setup_optimizers": False}
    scoring = trainer(importance, strategy=buffers, max_steps=1, limit_val_batches=4)
    resume.setup(scoring, model)
    scoring.validate(model, data)

    target = resolve_target(source.architecture, {"hidden_size": "3/4", "ffn_hidden_size": "9/14"})
    plan = make_plan(source.architecture, target, importance.scores, source_sha256=source.sha256())
    plan.save(f"{output}/plan.json")

    # The same checkpoint again: restored, pruned, and only then given an optimizer.
    llm.train(
        load_context(Path(checkpoint) / "context", "model"),
        data,
        trainer(PruneTransform(plan), max_steps=2, limit_val_batches=0),
        log=nl.NeMoLogger(
            explicit_log_dir=f"{output}/student",
            ckpt=nl.ModelCheckpoint(
                save_last=True, save_top_k=0, save_context_on_train_end=True, save_optim_on_train_end=True
            ),
        ),
        resume=resume,
        optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-4, use_distributed_optimizer=False)),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
