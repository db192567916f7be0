"""Packed sequences for training and validation: Megatron-core's GPTDataset over an indexed corpus."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_minitron.data.corpora import SPLITS
from nemo_minitron.data.indexed import exclusive
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


@dataclass(frozen=True)
class EndOfDocument:
    """What GPTDataset asks of a tokenizer: the id that ends a document. No `pad`, since nothing is padded."""

    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Part of the name of GPTDataset's cached indices."""
        return {"eod": self.eod}


def gpt_dataset(
    prefix: str,
    split_name: str,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    tokenizer_eod: int,
    cache_dir: str | Path,
    *,
    create_attention_mask: bool = False,
) -> "GPTDataset":
    """Sequences packed from one split's documents, shuffled by `seed`: the same samples in every process.

    A sample holds `tokens`, `labels` (the next tokens) and `position_ids`, int64 [s], `loss_mask`, float32
    [s], all ones, and on request `attention_mask`, bool [1, s, s], true where attention is forbidden (the
    local layer spec needs it). Sequences run on through document ends; the tokens after an epoch's last whole
    sequence open the next epoch or, at the end, stay unused. Where torch.distributed is initialised, every
    rank must call.

    Args:
        prefix: the path prefix of the split's `.bin` and `.idx` files.
        split_name: "train" or "valid".
        num_samples: at least so many, over as many epochs as that takes; None: exactly one epoch.
        seq_length: tokens in a sample.
        seed: of the order.
        tokenizer_eod: the id that ends a document.
        cache_dir: where the order is kept, shared by all ranks.

    Raises:
        InputError: no such index files, or an unknown split.

    Source: megatron/core/datasets/gpt_dataset.py@0.13.1.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if split_name not in SPLITS:
        raise InputError(f"split {split_name}: must be one of {', '.join(SPLITS)}")
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise InputError(f"{prefix}{suffix}: no such index file")
    index = SPLITS.index(split_name)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([prefix], None) if i == index else None for i in range(3)],
        path_to_cache=str(cache_dir),
        tokenizer=EndOfDocument(tokenizer_eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=create_attention_mask,
    )
    sizes = [num_samples if i == index else 0 for i in range(3)]
    with _one_builder(Path(cache_dir)):
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[index]


@contextmanager
def _one_builder(cache_dir: Path) -> Iterator[None]:
    """Keep GPTDataset's cache sound: it writes files in place and takes any that it finds for whole.

    It also reads them with pickle allowed; a file that holds pickled objects is removed here before it is
    read.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(cache_dir / ".lock"):
        for path in cache_dir.glob("*.npy"):
            try:
                np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError):
                path.unlink()
        yield
