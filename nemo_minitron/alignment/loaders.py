"""NeMo-Aligner's data sets and loaders over encoded conversations and rendered preference pairs."""

from typing import Any
from unittest import mock

from omegaconf import DictConfig

from nemo_minitron.alignment.conversations import chat_dataset_class


def sft_dataset(cfg: DictConfig, split: str, tokenizer: Any) -> Any:
    """What Aligner's `build_sft_dataset` makes of a split, with our reading of its lines.

    Args:
        cfg: the run's configuration, with `model.data.SPLIT`.
        split: "train_ds" or "validation_ds".
        tokenizer: the model's.
    """
    from nemo_aligner.data.nlp import builders

    # The builder takes the class from its module's names and has no argument for it.
    with mock.patch.object(builders, "GPTSFTChatDataset", chat_dataset_class()):
        dataset = builders.build_sft_dataset(
            cfg.model.data[split],
            tokenizer,
            None,
            answer_only_loss=True,
            is_chat=True,
            model_cfg=cfg.model,
        )
    # The model makes no use of an [s, s] mask with this setting, and the builder does not hand it on to the data.
    dataset.get_attention_mask_from_fusion = cfg.model.get_attention_mask_from_fusion
    return dataset


def sft_loader(cfg: DictConfig, split: str, dataset: Any, consumed_samples: int = 0) -> Any:
    """Aligner's loader: shuffled for training, in the file's order for validation, whole batches only.

    Args:
        cfg: the run's configuration.
        split: "train_ds" or "validation_ds".
        dataset: of `sft_dataset`.
        consumed_samples: of all ranks; training goes on after them.
    """
    from nemo_aligner.data.nlp.builders import build_dataloader

    return build_dataloader(
        cfg=cfg,
        dataset=dataset,
        consumed_samples=consumed_samples,
        mbs=cfg.model.data[split].micro_batch_size,
        gbs=cfg.model.data[split].global_batch_size,
        collate_fn=dataset.collate_fn,
        use_random_sampler=split == "train_ds",
    )


def dpo_datasets(cfg: DictConfig, tokenizer: Any) -> tuple[Any, Any]:
    """Aligner's training and validation pairs, all of both.

    Args:
        cfg: the run's configuration.
        tokenizer: the model's.
    """
    from nemo_aligner.data.nlp.builders import build_train_valid_test_dpo_datasets

    data = cfg.model.data
    train, valid, _ = build_train_valid_test_dpo_datasets(
        cfg=cfg.model,
        data_prefix=data.data_prefix,
        data_impl=data.data_impl,
        splits_string=data.splits_string,
        train_valid_test_num_samples=[-cfg.model.global_batch_size] * 3,
        seq_length=data.seq_length,
        seed=cfg.model.seed,
        tokenizer=tokenizer,
    )
    return train, valid


def dpo_loader(cfg: DictConfig, dataset: Any, consumed_samples: int | None = None) -> Any:
    """Aligner's loader of pairs; its trainer collates them itself.

    Args:
        cfg: the run's configuration.
        dataset: of `dpo_datasets`.
        consumed_samples: of all ranks, for training, which is shuffled; None for validation, which is not.
    """
    from nemo_aligner.data.nlp.builders import build_dataloader, identity_collate

    return build_dataloader(
        cfg=cfg,
        dataset=dataset,
        consumed_samples=consumed_samples or 0,
        mbs=cfg.model.micro_batch_size,
        gbs=cfg.model.global_batch_size,
        collate_fn=identity_collate,
        use_random_sampler=consumed_samples is not None,
    )
