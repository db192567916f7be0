"""Packed sequences for training and validation: Megatron-core's GPTDataset over an indexed corpus."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_minitron.data.blend import one_pass
from nemo_minitron.data.corpus import SPLITS
from nemo_minitron.data.file_sums import SumsFile
from nemo_minitron.data.indexed import exclusive
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

SUMS = "sha256.json"


@dataclass(frozen=True)
class EndOfDocument:
    """What GPTDataset asks of a tokenizer: the id that ends a document. No `pad`, since nothing is padded.

    megatron-core 0.16 also asks for `vocab_size`, to know the width of tokens in files that it need not open; None:
    it looks into them, as 0.13 does.
    """

    eod: int
    vocab_size: None = None

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Part of the name of GPTDataset's cached indices."""
        return {"eod": self.eod}


def never_padded(module: Any) -> Any:
    """Let one of NeMo's PreTrainingDataModules give packed sequences as they are, and return it.

    GPTDataset takes every token with the id of its tokenizer's `pad` for padding: id 0 takes its place, and no loss
    counts there, for that sample and, since the mask is kept and written in place, for all later ones. Where pad is
    the end of a document (as in Qwen2.5, Qwen3 and SmolLM2) the mask is soon empty. Packed sequences have no padding.
    The module's arguments, which NeMo writes into checkpoints, stay what they were.

    Source: megatron/core/datasets/gpt_dataset.py@0.13.1, lines 200 to 215.
    """
    module.tokenizer = EndOfDocument(module.tokenizer.eod)
    return module


def gpt_dataset(
    paths: str | Sequence[str],
    split_name: str,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    tokenizer_eod: int,
    cache_dir: str | Path,
    *,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
) -> "GPTDataset":
    """Sequences packed from a split's documents, shuffled by `seed`: the same samples in every process.

    Of one corpus, or of several in proportion to weights.

    A sample holds `tokens`, `labels` (the next tokens) and `position_ids`, int64 [s], `loss_mask`, float32
    [s], all ones, and with `reset_attention_mask` an `attention_mask`, bool [1, s, s], true where attention is
    forbidden. Sequences run on through document ends; the tokens after an epoch's last whole
    sequence open the next epoch or, at the end, stay unused. Where torch.distributed is initialised, every
    rank must call.

    Args:
        paths: the path prefix of the split's `.bin` and `.idx` files; or weights and prefixes in turn, of a blend.
        split_name: "train" or "valid".
        num_samples: at least so many, over as many epochs as that takes; None: exactly one epoch, or
            as many of a blend as read no part twice.
        seq_length: tokens in a sample.
        seed: of the order.
        tokenizer_eod: the id that ends a document.
        cache_dir: where the order is kept, shared by all ranks.
        reset_attention_mask: a document does not see those before it in the sequence.
        reset_position_ids: each document's positions begin at 0.

    Raises:
        InputError: no such index files, or an unknown split.

    Source: megatron/core/datasets/gpt_dataset.py@0.13.1.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    if split_name not in SPLITS:
        raise InputError(f"split {split_name}: must be one of {', '.join(SPLITS)}")
    prefixes, weights = get_blend_from_list([paths] if isinstance(paths, str) else list(paths))
    for prefix, suffix in itertools.product(prefixes, (".bin", ".idx")):
        if not Path(prefix + suffix).is_file():
            raise InputError(f"{prefix}{suffix}: no such index file")
    if weights is not None and num_samples is None:
        num_samples = _one_pass(prefixes, weights, seq_length)
    index = SPLITS.index(split_name)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(prefixes, weights) if i == index else None for i in range(3)],
        path_to_cache=str(cache_dir),
        tokenizer=EndOfDocument(tokenizer_eod),
        reset_position_ids=reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        eod_mask_loss=False,
        create_attention_mask=reset_attention_mask,
    )
    sizes = [num_samples if i == index else 0 for i in range(3)]
    with one_builder(Path(cache_dir)):
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[index]


def _one_pass(prefixes: Sequence[str], weights: Sequence[float], seq_length: int) -> int:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # Kept until all is counted: the lengths lie in memory that goes with the dataset.
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    tokens = [int(dataset.sequence_lengths.sum()) for dataset in datasets]
    return one_pass(
        [(count - 1) // seq_length for count in tokens], [weight / sum(weights) for weight in weights]
    )


@contextmanager
def one_builder(cache_dir: Path) -> Iterator[None]:
    """Keep GPTDataset's cache sound: it writes files in place and takes any that it finds for whole.

    It also reads them with pickle allowed; a file that holds pickled objects is removed here before it is
    read, and so is one that is not what it was when it was first read here (`SUMS`). Every rank enters.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(cache_dir / ".lock"):
        sums = SumsFile(cache_dir / SUMS)
        damaged = [path for path in cache_dir.glob("*.npy") if not _is_array(path) or sums.differs(path)]
        for path in damaged:
            print(f"{path}: damaged; made again", file=sys.stderr, flush=True)
            path.unlink()
        if damaged:
            sums.path.unlink(missing_ok=True)
        yield
        sums.record(sorted(cache_dir.glob("*.npy")))


def _is_array(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    return True
