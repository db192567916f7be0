"""NeMo 2's trainer and strategy from the configuration."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import nemo.lightning as nl
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

from nemo_minitron import cpu_compat
from nemo_minitron.config.recipes import DataConfig, OptimConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.chat.sequences import Conversations
from nemo_minitron.data.datasets import never_padded, one_builder
from nemo_minitron.data.sequences import schedules
from nemo_minitron.nemo import models


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; NeMo derives each model-parallel rank's seed from it (PL_GLOBAL_SEED)."""
    lightning.pytorch.seed_everything(seed)


def strategy(t: TrainerConfig, *, training: bool) -> nl.MegatronStrategy:
    """MegatronStrategy for a layout. Without `training` no optimizer and no gradient buffers exist."""
    dtype = torch.bfloat16 if t.precision.startswith("bf16") else torch.float32
    inference: dict[str, Any] = {} if training else {"setup_optimizers": False, "ddp": "pytorch"}
    return nl.MegatronStrategy(
        tensor_model_parallel_size=t.tensor_model_parallel_size,
        pipeline_model_parallel_size=t.pipeline_model_parallel_size,
        context_parallel_size=t.context_parallel_size,
        sequence_parallel=t.sequence_parallel,
        num_layers_in_first_pipeline_stage=t.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=t.num_layers_in_last_pipeline_stage,
        pipeline_dtype=dtype,
        # NeMo's own printer is disabled on all ranks but 0, where it enters a collective: a hang at the first
        # checkpoint of two ranks (ProgressPrinter.on_train_batch_end, nemo_toolkit 2.4.1).
        replace_progress_bar=False,
        ckpt_async_save=False,
        gradient_as_bucket_view=True,
        **inference,
    )


def trainer(t: TrainerConfig, *, training: bool, callbacks: list[Any] | None = None) -> nl.Trainer:
    """NeMo's Trainer: gloo ranks on the CPU where there is no CUDA, one GPU a rank where there is."""
    cpu = cpu_compat.prepare_megatron()
    models.quiet_nemo()
    plugins = [nl.MegatronMixedPrecision(precision=t.precision)] if t.precision != "32" else []
    made = nl.Trainer(
        accelerator="cpu" if cpu else "gpu",
        devices=t.ranks // t.num_nodes,
        num_nodes=t.num_nodes,
        strategy=strategy(t, training=training),
        plugins=plugins,
        max_steps=t.max_steps or 1,
        val_check_interval=t.val_check_interval or None,
        limit_val_batches=t.limit_val_batches,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=t.log_every_n_steps,
        accumulate_grad_batches=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        logger=False,
    )
    # Not through the constructor: NeMo writes its arguments into every checkpoint, and pickles what is not NeMo's own.
    made.callbacks[:0] = callbacks or []
    return made


def recompute(config: Any, t: TrainerConfig) -> None:
    """Let a NeMo config say which activations are recomputed in the backward pass."""
    config.recompute_granularity = t.recompute_granularity
    if t.recompute_granularity == "full":
        config.recompute_method, config.recompute_num_layers = "uniform", 1


def optimizer(o: OptimConfig, t: TrainerConfig) -> MegatronOptimizerModule:
    """Megatron-core's Adam under NeMo's cosine schedule, which ends at the last step."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        clip_grad=o.clip_grad,
        use_distributed_optimizer=o.use_distributed_optimizer,
        bf16=t.precision.startswith("bf16"),
    )
    schedule = CosineAnnealingScheduler(
        max_steps=t.max_steps, warmup_steps=o.warmup_steps, constant_steps=0, min_lr=o.min_lr
    )
    return MegatronOptimizerModule(config=config, lr_scheduler=schedule)


def training_data(
    indexed: Any,
    tokenizer: Any,
    d: DataConfig,
    t: TrainerConfig,
    cache: Path,
    train: list[str] | None = None,
    conversations: Conversations | None = None,
) -> Any:
    """NeMo's PreTrainingDataModule over an indexed corpus or a blend: documents packed, never padded.

    Args:
        train: what to train on instead of the corpus's train split: a prefix, or weights and prefixes in turn.
        conversations: what takes the place of some or all of those sequences, and of what is held out.
    """
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

    module = PreTrainingDataModule(
        paths={
            "train": train or indexed.paths("train"),
            "validation": indexed.paths("valid"),
            "test": indexed.paths("valid"),
        },
        seq_length=d.seq_length,
        tokenizer=tokenizer,
        micro_batch_size=t.micro_batch_size,
        global_batch_size=t.global_batch_size,
        seed=d.seed,
        split=None,
        num_workers=0,
        index_mapping_dir=str(cache),
        reset_attention_mask=d.reset_attention_mask,
        reset_position_ids=d.reset_position_ids,
    )
    # NeMo turns it on where Transformer Engine is missing; no attention here needs [1, s, s] to be causal.
    module.create_attention_mask = d.reset_attention_mask
    _let_build(module, d, t, cache, conversations)
    return never_padded(module)


def _let_build(
    module: Any, d: DataConfig, t: TrainerConfig, cache: Path, conversations: Conversations | None
) -> None:
    """Have a data module build one rank after the other, and put conversations where they are asked for."""
    build = module.build

    def guarded(
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int,
        trainer_limit_test_batches: int,
    ) -> None:
        asked = trainer_max_steps, trainer_val_check_interval, trainer_limit_val_batches
        with one_builder(Path(cache)):
            build(*asked, trainer_limit_test_batches)
        if conversations is not None:
            of_run = schedules(trainer_max_steps, t.global_batch_size, *asked[1:])
            train, valid = of_run["train"].drawn, of_run["valid"].drawn
            module._train_ds = conversations.dataset("train", d, train, module._train_ds)
            module._validation_ds = conversations.dataset("valid", d, valid)

    module.build = guarded
