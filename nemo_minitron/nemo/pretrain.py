"""The work of `recipes/pretrain.py`: a Llama-architecture GPT from scratch with NeMo 2."""

from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.config import PretrainRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError


def architecture(recipe: PretrainRecipe, vocab_size: int) -> Architecture:
    """The model's sizes, checked against the layout.

    Raises:
        InputError: sizes that the tensor- or pipeline-parallel size does not divide.
    """
    m, t = recipe.model, recipe.trainer
    arch = Architecture(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.kv_channels,
        vocab_size=vocab_size,
        share_embeddings_and_output_weights=m.share_embeddings_and_output_weights,
        rotary_base=m.rotary_base,
    )
    for name in ("ffn_hidden_size", "num_query_groups", "vocab_size"):
        if getattr(arch, name) % t.tensor_model_parallel_size:
            raise InputError(
                f"model.{name}={getattr(arch, name)}: not divisible by trainer.tensor_model_parallel_size="
                f"{t.tensor_model_parallel_size}"
            )
    if arch.num_layers % t.pipeline_model_parallel_size:
        raise InputError(
            f"model.num_layers={arch.num_layers}: not divisible by trainer.pipeline_model_parallel_size="
            f"{t.pipeline_model_parallel_size}"
        )
    return arch


def check(recipe: PretrainRecipe) -> tuple[PreparedData, Architecture]:
    """Prepare the data and check the sizes, before NeMo is imported.

    Raises:
        InputError: what `prepare_data` and `architecture` refuse; no training steps.
    """
    if recipe.trainer.max_steps < 1:
        raise InputError(f"trainer.max_steps={recipe.trainer.max_steps}: must be at least 1")
    data = prepare_data(recipe.data)
    return data, architecture(recipe, data.indexed.vocab_size)


def run(
    recipe: PretrainRecipe, prepared: tuple[PreparedData, Architecture], directory: Path
) -> dict[str, Any]:
    """Train, or go on where a killed run stopped; then measure the held-out loss.

    Returns:
        The fields of `result.json`.
    """
    from nemo.collections import llm

    from nemo_minitron.nemo import models, session, trainer

    data, arch = prepared
    t = recipe.trainer
    config = models.to_config(arch, seq_length=recipe.data.seq_length, precision=t.precision)
    trainer.seed_everything(recipe.seed)
    config.init_method_std = recipe.model.init_method_std
    tokenizer = session.nemo_tokenizer(data.tokenizer_dir)
    model = models.to_model(config, tokenizer, trainer.optimizer(recipe.optim, t))
    llm.train(
        model,
        trainer.training_data(data.indexed, tokenizer, recipe.data, t, data.index_cache),
        trainer.trainer(t, training=True),
        log=_logger(directory, t.val_check_interval or t.max_steps),
        resume=_resume(directory),
    )
    return {
        "checkpoint": str(last_checkpoint(directory)),
        "params": arch.parameters(),
        "tokens": t.max_steps * t.global_batch_size * recipe.data.seq_length,
        "steps": t.max_steps,
        "seed": recipe.seed,
        "data_manifest_sha256": data.indexed.manifest_sha256,
    }


def _logger(directory: Path, every_n_steps: int) -> Any:
    import nemo.lightning as nl

    checkpoints = nl.ModelCheckpoint(
        every_n_train_steps=every_n_steps,
        save_last=True,
        save_top_k=1,
        monitor="val_loss",
        filename="{step}",
        # Without it the save at the last step leaves the optimizer out, and resuming fails with a KeyError.
        save_optim_on_train_end=True,
        save_context_on_train_end=True,
        always_save_context=True,
    )
    return nl.NeMoLogger(
        explicit_log_dir=str(directory / "nemo"), ckpt=checkpoints, update_logger_directory=False
    )


def _resume(directory: Path) -> Any:
    import nemo.lightning as nl

    return nl.AutoResume(
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
        resume_from_directory=str(directory / "nemo" / "checkpoints"),
    )


def last_checkpoint(directory: Path) -> Path:
    """The newest finished checkpoint of a training run (`*-last`)."""
    found = [p for p in (directory / "nemo" / "checkpoints").glob("*-last") if (p / "context").is_dir()]
    assert found, f"{directory}: NeMo left no checkpoint"
    return max(found, key=lambda p: p.stat().st_mtime)
