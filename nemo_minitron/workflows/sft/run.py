"""The work of `recipes/sft.py`: supervised fine-tuning on conversations with NeMo-Aligner."""

from pathlib import Path
from typing import Any

from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
from nemo_aligner.utils.train_script_utils import retrieve_custom_trainer_state_dict

from nemo_minitron.alignment import loaders, training
from nemo_minitron.alignment.prepared import Prepared
from nemo_minitron.alignment.samples import sampling_trainer
from nemo_minitron.config.align import SftRecipe
from nemo_minitron.data.chat.encoded import EncodedSplit
from nemo_minitron.workflows.align import check as checks
from nemo_minitron.workflows.align.result import summary


def run(r: SftRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or resume a run that was killed; leave the result as a NeMo 2 directory.

    Returns:
        The fields of `result.json`.
    """
    training.save_result(_train(r, prepared, directory), prepared, directory)
    losses = training.lm_losses(r, prepared, directory)
    return {"recipe": "sft", **summary(r, prepared, directory), **losses}


def _train(r: SftRecipe, prepared: Prepared, directory: Path) -> Any:
    cfg = training.run_configuration(r, prepared, directory, key="sft", data=_data_config(r, prepared))
    trainer, model = training.open_model(cfg, "sft", model_class, prepared.student, (r.logger, directory))

    done = retrieve_custom_trainer_state_dict(trainer)
    train, valid = (
        loaders.sft_dataset(cfg, split, model.tokenizer) for split in ("train_ds", "validation_ds")
    )
    training.fit(
        sampling_trainer(model, str(prepared.tokenizer), r.align, directory, done["step"] if done else 0),
        trainer,
        model,
        cfg,
        training.run_log(directory, done),
        done=done,
        train=loaders.sft_loader(cfg, "train_ds", train, done["consumed_samples"] if done else 0),
        valid=loaders.sft_loader(cfg, "validation_ds", valid),
    )
    return model


def model_class() -> Any:
    """Aligner's; imported late."""
    return GPTSFTModel


def _data_config(r: SftRecipe, prepared: Prepared) -> dict[str, Any]:
    t = prepared.trainer
    validated = checks.validation_batch(r.align, t, prepared.valid.samples, whole_batches=False)

    def split(of: EncodedSplit, global_batch_size: int) -> dict[str, Any]:
        return {
            "file_path": of.path,
            "micro_batch_size": min(t.micro_batch_size, global_batch_size // t.data_parallel_size),
            "global_batch_size": global_batch_size,
            "max_seq_length": r.data.seq_length,
            "min_seq_length": 1,
            "memmap_workers": 1,
            "index_mapping_dir": str(Path(of.path).parent),
        }

    return {
        "num_workers": 0,
        "chat": True,
        "train_ds": split(prepared.train, t.global_batch_size),
        "validation_ds": split(prepared.valid, validated),
    }
