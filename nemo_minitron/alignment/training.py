"""What every alignment run does with NeMo-Aligner, in the order of its scripts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_minitron import cpu_compat, parallel
from nemo_minitron.alignment import lora, runs
from nemo_minitron.alignment.checkpoints import load_model, save_model
from nemo_minitron.alignment.prepared import STEPS, Prepared, has_cuda
from nemo_minitron.checkpoints.source import CHECKPOINT, Source, find_source
from nemo_minitron.config.logger import LoggerConfig
from nemo_minitron.cpu_compat.aligner import connect_ranks
from nemo_minitron.environment import rank
from nemo_minitron.padding import leave_out_padding
from nemo_minitron.progress import track


def run_configuration(
    r: Any, prepared: Prepared, directory: Path, *, key: str, data: dict[str, Any]
) -> DictConfig:
    """`runs.aligner_config` of a recipe.

    Args:
        key: of the algorithm's part, "sft" or "dpo".
        data: `model.data`.
    """
    return runs.aligner_config(
        prepared.student,
        prepared.trainer,
        r.align,
        key=key,
        directory=directory,
        tokenizer=str(prepared.tokenizer),
        seq_length=r.data.seq_length,
        max_epochs=prepared.max_epochs,
        seed=r.seed,
        cuda=has_cuda(),
        fused=cpu_compat.has_transformer_engine(),
        data=data,
    )


def open_model(
    cfg: DictConfig,
    key: str,
    cls_of: Callable[[], Any],
    source: Source,
    tracked: tuple[LoggerConfig, Path] | None = None,
) -> tuple[Any, Any]:
    """Trainer and model, with the ranks connected and the adapters, if any, in place.

    Args:
        cfg: of `runs.aligner_config`.
        key: of the algorithm's part of it, "sft" or "dpo".
        cls_of: gives the model's class once NeMo may be imported.
        source: a checkpoint of kind "nemo".
        tracked: where the figures of each step also go, and the run's directory.
    """
    cpu = cpu_compat.prepare_aligner()
    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.utils import train_script_utils as aligner

    from nemo_minitron.nemo import models, trackers  # imports NeMo, once Aligner's gaps are closed

    models.quiet_nemo()
    trainer = aligner.resolve_and_create_trainer(cfg, key)
    exp_manager(trainer, cfg.exp_manager)
    trainer.loggers = list(trackers.trackers(*tracked).values()) if tracked else []
    connect_ranks(trainer, cfg.model)
    model = load_model(cls_of(), cfg.model, trainer, source)
    for chunk in model.get_model_module_list():
        leave_out_padding(chunk, source.architecture.vocab_size)
    aligner.init_peft(model, cfg.model)
    lora.attach(model)
    aligner.init_distributed(trainer, model, use_te=not cpu)
    return trainer, model


def fit(
    make: Callable[..., Any],
    trainer: Any,
    model: Any,
    cfg: DictConfig,
    log: runs.RunLog,
    *,
    done: dict[str, Any] | None,
    train: Any,
    valid: Any,
    **more: Any,
) -> None:
    """Make Aligner's trainer and run it to its end, after what a killed run has done or a first validation.

    Args:
        make: the class of Aligner's trainer.
        done: of `retrieve_custom_trainer_state_dict`.
        train, valid: loaders.
        more: further arguments of the trainer.
    """
    from nemo_aligner.utils import train_script_utils as aligner
    from nemo_aligner.utils.distributed import Timer

    log.follow = partial(track, trainer.loggers)
    aligner.init_using_ptl(trainer, model, train, train.dataset)
    optimizer, scheduler = aligner.extract_optimizer_scheduler_from_ptl_model(model)
    made = make(
        cfg=cfg.trainer["dpo" if "dpo" in cfg.trainer else "sft"],
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=train,
        val_dataloader=valid,
        test_dataloader=None,
        logger=log,
        ckpt_callback=aligner.add_custom_checkpoint_callback(trainer, model),
        run_timer=Timer(None),
        **more,
    )
    made.train_single_step = counting(made.train_single_step)
    if done:
        made.load_state_dict(done)
    else:
        log.log_metrics(made.run_validation()[1], step=0, prefix="val/")
    made.fit()


def counting(
    step: Callable[[Any], tuple[Any, dict[str, Any]]],
) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """A training step of Aligner's that also says `tokens`: how many of the global batch its loss is of.

    Args:
        step: of a rank's part of a global batch: `loss_mask` [b, s], or of pairs `chosen_labels` and `rejected_labels`
            [b, s], -100 where nothing is learned.
    """

    def counted(batch: Any) -> tuple[Any, dict[str, Any]]:
        if "loss_mask" in batch:
            own = batch["loss_mask"].sum()
        else:
            own = sum((batch[f"{name}_labels"] > -100).sum() for name in ("chosen", "rejected"))
        device = "cuda" if has_cuda() else "cpu"
        tokens = parallel.all_reduce(own.to(device, torch.float64), "dp")
        loss, metrics = step(batch)
        return loss, {**metrics, "tokens": int(tokens)}

    return counted


def run_log(directory: Path, done: dict[str, Any] | None) -> runs.RunLog:
    """The log of a run that goes on after `done`."""
    steps = done["step"] if done else 0
    return runs.RunLog(directory / STEPS, write=rank() == 0, done=steps)


def save_result(model: Any, prepared: Prepared, directory: Path) -> None:
    """Leave a trained model as RUN/checkpoint; every rank makes this call."""
    lora.merge(model)
    save_model(
        model,
        prepared.student,
        directory / CHECKPOINT,
        tokenizer=prepared.tokenizer,
        dtype=prepared.trainer.checkpoint_dtype,
    )


def lm_losses(r: Any, prepared: Prepared, directory: Path) -> dict[str, float]:
    """What alignment costs in language modelling: the loss on held-out text in nats a token, before and after."""
    from nemo_minitron.nemo.session import Session  # imports NeMo 2; training needs NeMo 1 alone

    found = {}
    for when, source in (("before", prepared.student), ("after", find_source(directory / CHECKPOINT))):
        session = Session(source, r.trainer, seq_length=source.seq_length)
        loss = session.lm_loss(prepared.corpus, r.data, "valid", r.eval.samples, f"LM loss {when}")
        found[f"lm_loss_nats_{when}"] = loss.nats
    return found
