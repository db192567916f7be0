"""The work of `recipes/preference.py`: DPO and its reward-aware variants with NeMo-Aligner."""

from functools import partial
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.dpo import DPOTrainer, dpo_custom_collate
from nemo_aligner.models.nlp.gpt.megatron_gpt_dpo_model import MegatronGPTDPOModel
from nemo_aligner.utils.train_script_utils import retrieve_custom_trainer_state_dict
from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

from nemo_minitron.alignment import loaders, training
from nemo_minitron.alignment.prepared import Prepared
from nemo_minitron.config.align import PreferenceRecipe
from nemo_minitron.workflows.align.result import summary


def run(r: PreferenceRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or resume a run that was killed; leave the result as a NeMo 2 directory.

    Returns:
        The fields of `result.json`.
    """
    training.save_result(_train(r, prepared, directory), prepared, directory)
    losses = training.lm_losses(r, prepared, directory)
    d = r.align.dpo
    return {
        "recipe": "preference",
        **summary(r, prepared, directory, ("acc", "rewards_chosen_mean", "rewards_rejected_mean")),
        **losses,
        "preference_loss": d.preference_loss,
        "ref_policy_kl_penalty": d.ref_policy_kl_penalty,
    }


def _train(r: PreferenceRecipe, prepared: Prepared, directory: Path) -> Any:
    cfg = training.run_configuration(r, prepared, directory, key="dpo", data=_data_config(r, prepared))
    cfg.model.dpo = {
        **vars(r.align.dpo),
        "log_prob_forward_micro_batch_size": prepared.trainer.micro_batch_size,
    }
    trainer, model = training.open_model(cfg, "dpo", _model_class, prepared.student, (r.logger, directory))

    if r.align.peft == "none":  # with adapters the reference is the model without them
        amp = cfg.model.megatron_amp_O2
        model.ref_policy_state_dict = retrieve_model_state_dict_in_cpu(model, megatron_amp_O2=amp)
    done = retrieve_custom_trainer_state_dict(trainer)
    train, valid = loaders.dpo_datasets(cfg, model.tokenizer)
    training.fit(
        DPOTrainer,
        trainer,
        model,
        cfg,
        training.run_log(directory, done),
        done=done,
        train=loaders.dpo_loader(cfg, train, done["consumed_samples"] if done else 0),
        valid=loaders.dpo_loader(cfg, valid),
        collate_fn=partial(dpo_custom_collate, eos_id=model.tokenizer.eos_id),
    )
    return model


def _model_class() -> Any:
    return MegatronGPTDPOModel


def _data_config(r: PreferenceRecipe, prepared: Prepared) -> dict[str, Any]:
    train, valid = prepared.train.path, prepared.valid.path
    return {
        "num_workers": 0,
        "data_impl": "jsonl",
        "splits_string": None,
        "seq_length": r.data.seq_length,
        "data_prefix": {"train": [train], "validation": [valid], "test": [valid]},
    }
