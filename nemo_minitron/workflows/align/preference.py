"""The work of `recipes/preference.py`: DPO and its reward-aware variants with NeMo-Aligner."""

from functools import partial
from pathlib import Path
from typing import Any

from nemo_minitron.alignment.comparisons import encode_pairs
from nemo_minitron.alignment.conversations import EncodedSplit
from nemo_minitron.config.align import PreferenceRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.chat.conversations import read_preferences
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.align import check as checks
from nemo_minitron.workflows.align.check import Prepared


def check(r: PreferenceRecipe) -> Prepared:
    """Refuse what cannot work; convert the checkpoint and render the pairs once.

    Raises:
        InputError: as `checks.prepare`; answers to be written; weights of the losses that are all 0; a
            pair without rewards.
    """
    if r.align.samples > 0:
        raise InputError(f"align.samples={r.align.samples}: must be 0, only recipes/sft.py writes answers")
    d = r.align.dpo
    if not d.preference_loss_weight and not d.sft_loss_weight:
        raise InputError(
            "align.dpo.preference_loss_weight=0: and align.dpo.sft_loss_weight=0: one must not be 0"
        )
    own = ("preference_train", "preference_valid")
    return checks.prepare(r, partial(_encode, r), own_set=own, whole_batches=True)


def _encode(r: PreferenceRecipe, name: str, files: list[str], tokenizer: Any) -> EncodedSplit:
    return encode_pairs(
        (pair for file in files for pair in read_preferences(file)),
        tokenizer,
        name=name,
        seq_length=r.data.seq_length,
        longer=r.align.longer,
        preference_loss=r.align.dpo.preference_loss,
        directory=cache_dir(r.data, "conversations"),
    )


def run(r: PreferenceRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or go on where a killed run stopped; leave the result as a NeMo 2 directory.

    Returns:
        The fields of `result.json`.
    """
    from nemo_minitron.alignment import training

    training.save_result(_train(r, prepared, directory), prepared, directory)
    losses = training.lm_losses(r, prepared, directory)
    d = r.align.dpo
    return {
        "recipe": "preference",
        **checks.summary(r, prepared, directory, ("acc", "rewards_chosen_mean", "rewards_rejected_mean")),
        **losses,
        "preference_loss": d.preference_loss,
        "ref_policy_kl_penalty": d.ref_policy_kl_penalty,
    }


def _train(r: PreferenceRecipe, prepared: Prepared, directory: Path) -> Any:
    from nemo_minitron.alignment import loaders, training

    cfg = training.run_configuration(r, prepared, directory, key="dpo", data=_data_config(r, prepared))
    cfg.model.dpo = {
        **vars(r.align.dpo),
        "log_prob_forward_micro_batch_size": prepared.trainer.micro_batch_size,
    }
    trainer, model = training.open_model(cfg, "dpo", _model_class, prepared.student)
    from nemo_aligner.algorithms.dpo import DPOTrainer, dpo_custom_collate
    from nemo_aligner.utils.train_script_utils import retrieve_custom_trainer_state_dict
    from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

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
    from nemo_aligner.models.nlp.gpt.megatron_gpt_dpo_model import MegatronGPTDPOModel

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
