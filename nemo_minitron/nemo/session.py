"""A checkpoint opened under a layout, without optimizer and gradient buffers: to score, evaluate, prune and save."""

import logging
from pathlib import Path
from typing import Any

import torch
from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.pl import TrainerContext

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.saved_dtype import saving_in
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.checkpoints.true_rows import cut_padding
from nemo_minitron.checkpoints.untrusted import weights_may_only_be_tensors
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.datasets import gpt_dataset
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.environment import rank
from nemo_minitron.evaluation.lm_loss import LMLoss, lm_loss
from nemo_minitron.evaluation.multiple_choice import Task, accuracy_and_margin, choice_losses
from nemo_minitron.files import put, remove_stale
from nemo_minitron.megatron_gpt import gpt_model
from nemo_minitron.nemo import models, trainer
from nemo_minitron.nemo.tokenizer_files import tokenizer_files
from nemo_minitron.progress import progress_bar

logger = logging.getLogger("nemo_minitron")


def nemo_tokenizer(directory: str | Path, settings_of: Path | None = None) -> Any:
    """NeMo's wrapper of a Hugging Face tokenizer; no remote code.

    Args:
        directory, settings_of: as `tokenizer_files`; that directory is what checkpoints get a copy of.
    """
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(str(tokenizer_files(directory, settings_of)), trust_remote_code=False)


class Session:
    """A NeMo 2 model with restored weights on this rank's shard of the layout."""

    def __init__(
        self,
        source: Source,
        layout: TrainerConfig,
        seq_length: int | None = None,
        tokenizer: str | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        """Build the model from the checkpoint's architecture and restore its weights with NeMo.

        Args:
            source: a checkpoint of kind "nemo" (see `huggingface.import_checkpoint` for the other kind).
            layout: under which it is opened; every rank of it makes this call.
            tokenizer: what the data was read with, and a saved student carries; None: the source's own.
            architecture: of a model that whoever asks will fill; its weights are random. None: the source's, restored.
        """
        assert source.kind == "nemo", source
        self.layout, self.source = layout, source
        config = models.to_config(
            architecture or source.architecture,
            seq_length=seq_length or source.seq_length,
            precision=layout.precision,
        )
        own = source.tokenizer
        self.model = models.to_model(config, nemo_tokenizer(tokenizer or own, own if tokenizer else None))
        self.trainer = trainer.trainer(layout, training=False)
        if architecture is not None:
            self.trainer.strategy.selective_restore = lambda: None
        with weights_may_only_be_tensors():
            _setup_trainer_and_restore_model(source.path, self.trainer, self.model)

    @property
    def chunks(self) -> list[Any]:
        """This rank's Megatron-core GPTModels."""
        return [gpt_model(chunk) for chunk in self.trainer.strategy.megatron_parallel]

    @property
    def architecture(self) -> Architecture:
        """The sizes that the model has now."""
        return models.from_config(self.model.config)

    def lm_loss(
        self, data: PreparedData, d: DataConfig, split: str, samples: int | None, label: str
    ) -> LMLoss:
        """Loss in nats over the first `samples` packed sequences of a split (None: all of one pass), with progress."""
        return split_loss(
            self.chunks, data, d, split, samples, micro_batch_size=self.layout.micro_batch_size, label=label
        )

    def loss_on(self, dataset: Any, samples: int, label: str, *, tokens: int) -> LMLoss:
        """Loss in nats over the first `samples` items, of `tokens` tokens, of a data set like GPTDataset."""
        progress = progress_bar(label, samples, tokens=tokens)
        size = self.layout.micro_batch_size
        return lm_loss(self.chunks, dataset, samples, micro_batch_size=size, progress=progress)

    def accuracy(self, task: Task, normalize: bool, label: str) -> float:
        """How often the right choice of a multiple-choice task is the most probable one, in [0, 1]; with progress."""
        losses = choice_losses(
            self.chunks,
            task,
            micro_batch_size=self.layout.micro_batch_size,
            normalize=normalize,
            progress=progress_bar(label, len(task.requests)),
        )
        return float(accuracy_and_margin(losses, task)[0][0])

    def dataset(self, data: PreparedData, d: DataConfig, split: str) -> Any:
        """One pass over a split in Megatron's shuffled, packed order."""
        return packed(data, d, split)

    def round(self, dtype: str) -> None:
        """Round the weights to what a checkpoint of this dtype (in torch's word) will hold; they keep their own."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)))

    def save(self, directory: Path, dtype: str | None = None) -> None:
        """Write a NeMo 2 checkpoint (weights and context), as NeMo's own connectors do; every rank makes this call.

        Args:
            directory: replaced if it exists; what is written gets this name when it is whole.
            dtype: of the weights, in torch's word; None: that of the layout's `checkpoint_dtype`, else the source's.
        """
        temporary = remove_stale(directory.with_name(f".{directory.name}.tmp"))
        self.trainer.strategy.barrier("removed")  # before any rank makes the directory again
        with saving_in(self.trainer, self.model, dtype or self.layout.checkpoint_dtype or self.source.dtype):
            self.trainer.save_checkpoint(temporary, weights_only=True)
        if rank() == 0:
            TrainerContext.from_trainer(self.trainer).io_dump(
                ckpt_to_context_subdir(temporary), yaml_attrs=["model"]
            )
            cut_padding(temporary / "weights", self.architecture.vocab_size)
            remove_stale(directory)
            put(temporary, directory)
        self.trainer.strategy.barrier("saved")


def packed(data: PreparedData, d: DataConfig, split: str) -> Any:
    """One pass over a split in Megatron's shuffled, packed order."""
    return gpt_dataset(
        data.indexed.paths(split),
        split,
        None,
        d.seq_length,
        d.seed,
        data.indexed.eod,
        data.index_cache,
        reset_attention_mask=d.reset_attention_mask,
        reset_position_ids=d.reset_position_ids,
    )


def split_loss(
    chunks: list[Any],
    data: PreparedData,
    d: DataConfig,
    split: str,
    samples: int | None,
    *,
    micro_batch_size: int,
    label: str,
) -> LMLoss:
    """`lm_loss` of GPTModels over the first `samples` packed sequences of a split (None: all), with progress."""
    dataset = packed(data, d, split)
    count = min(samples or len(dataset), len(dataset))
    progress = progress_bar(label, count, tokens=d.seq_length)
    return lm_loss(chunks, dataset, count, micro_batch_size=micro_batch_size, progress=progress)
