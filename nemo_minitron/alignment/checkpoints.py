"""NeMo 2 directories in and out of NeMo-Aligner's models, sharded on both ways.

In: Aligner's own way of loading NeMo 2 weights (`load_from_nemo`, nemo_aligner/utils/utils.py@0.7.0) with the model's
configuration made from the checkpoint's architecture, where Aligner would run what the checkpoint's context names and
write a file into it. Out: megatron-core's sharded saving under NeMo 2's names.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_minitron import parallel
from nemo_minitron.checkpoints.saved_dtype import cast, name_dtype
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.checkpoints.true_rows import cut_padding
from nemo_minitron.checkpoints.untrusted import weights_may_only_be_tensors
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.environment import rank
from nemo_minitron.files import put, remove_stale
from nemo_minitron.nemo import models, trainer
from nemo_minitron.nemo.session import nemo_tokenizer


def load_model(cls: Any, cfg: DictConfig, trainer: Any, source: Source) -> Any:
    """An Aligner model with the weights of a NeMo 2 directory, this rank's shard of them.

    Args:
        cls: one of Aligner's model classes.
        cfg: of the model.
        trainer: of `resolve_and_create_trainer`, its ranks connected.
        source: of kind "nemo".
    """
    from nemo_aligner.utils.utils import CustomSaveRestoreConnector

    assert source.kind == "nemo", source
    connector = CustomSaveRestoreConnector(replace_sharded_tensor_key="module")
    connector.model_weights_ckpt = "weights"
    connector.model_extracted_dir = str(source.path)
    with weights_may_only_be_tensors():
        model = cls.restore_from(
            restore_path=str(source.path),
            trainer=trainer,
            override_config_path=cfg,
            save_restore_connector=connector,
            strict=True,
        )
    # The model saves with it too.
    connector.model_weights_ckpt, connector.model_extracted_dir = "model_weights.ckpt", None
    return model


def save_model(
    model: Any, source: Source, output: Path, *, tokenizer: Path, dtype: str | None = None
) -> None:
    """Write an Aligner model as a NeMo 2 directory; every rank makes this call.

    Args:
        model: its adapters, if it has any, are merged already (`lora.merge`).
        source: what it was loaded from; the architecture is the same.
        output: replaced if it exists.
        tokenizer: a Hugging Face directory, with the chat template.
        dtype: of the weights, in torch's word; None: the source's.
    """
    from megatron.core import dist_checkpointing

    dtype = dtype or source.dtype
    temporary = output.with_name(f".{output.name}.tmp")
    if rank() == 0:
        remove_stale(temporary)
        (temporary / "weights").mkdir(parents=True)
        common = _write_context(source, temporary / "context", tokenizer, dtype)
    else:
        common = {}
    parallel.barrier()
    (module,) = model.get_model_module_list()
    weights = module.sharded_state_dict(prefix="module.")
    cast(weights, dtype)
    dist_checkpointing.save({**common, **weights}, str(temporary / "weights"))
    parallel.barrier()
    if rank() == 0:
        cut_padding(temporary / "weights", source.architecture.vocab_size)
        remove_stale(output)
        put(temporary, output)
    parallel.barrier()


def _write_context(source: Source, context: Path, tokenizer: Path, dtype: str) -> dict[str, Any]:
    """NeMo 2's context of the model, and what it expects beside the weights."""
    import lightning.pytorch
    from nemo.lightning.io.pl import TrainerContext

    config = models.to_config(source.architecture, seq_length=source.seq_length)
    model = models.to_model(config, nemo_tokenizer(tokenizer))
    made = trainer.trainer(TrainerConfig(), training=False)
    made.strategy.connect(model)
    model.trainer = made
    name_dtype(model, dtype)
    TrainerContext.from_trainer(made).io_dump(context, yaml_attrs=["model"])
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.pytorch.__version__,
        "state_dict": {},
        "loops": made._checkpoint_connector._get_loops_state_dict(),
    }
