"""The sequences that a run is said to read, against NeMo's own data module and sampler."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.distributed.sessions import PATIENCE_S

LENGTHS = [5, 40, 1, 17, 3, 64, 9, 2, 28]
PAD = 33


class Tokenizer:
    """What GPTDataset asks of NeMo's; its padding token also occurs in the text."""

    eod, pad = 100_000, PAD
    unique_identifiers = {"eod": 100_000, "pad": PAD}  # noqa: RUF012


def both(directory: str, steps: int, batch: int, interval: int, limit: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from nemo_minitron.config import DataConfig
    from nemo_minitron.data.sequences import SplitSequences, schedules
    from nemo_minitron.nemo.trainer import training_data

    prefixes = {}
    for split, first in (("train", 0), ("valid", 7)):
        builder = IndexedDatasetBuilder(f"{directory}/{split}.bin", dtype=np.int32)
        for length in LENGTHS:
            builder.add_document(torch.arange(first, first + length), [length])
            first += length
        builder.finalize(f"{directory}/{split}.idx")
        prefixes[split] = f"{directory}/{split}"
    d = DataConfig(seq_length=8, seed=5)
    indexed = SimpleNamespace(
        train_prefix=prefixes["train"], valid_prefix=prefixes["valid"], prefix=prefixes.get, eod=Tokenizer.eod
    )
    data = SimpleNamespace(
        indexed=indexed, tokenizer=SimpleNamespace(pad_token_id=PAD), index_cache=f"{directory}/ours"
    )
    trainer = SimpleNamespace(micro_batch_size=1, global_batch_size=batch)
    module = training_data(indexed, Tokenizer(), d, trainer, f"{directory}/theirs")
    module.build(steps, interval or steps, limit, 0)
    for split, dataset in (("train", module._train_ds), ("valid", module._validation_ds)):
        schedule = schedules(steps, batch, interval, limit)[split]
        ours = SplitSequences(data, d, split, schedule.drawn)
        assert len(ours.dataset) == len(dataset) >= schedule.used
        for number in range(len(dataset)):
            assert torch.equal(ours.tokens(number), dataset[number]["tokens"])


# Epochs have 21 sequences.
@pytest.mark.parametrize(
    ("steps", "batch", "interval", "limit"), [(5, 4, 0, 1), (20, 4, 3, 2), (7, 13, 7, 5), (11, 2, 50, 1)]
)
def test_nemo_reads_them(run_on_ranks, tmp_path, steps, batch, interval, limit):
    run_on_ranks(1, both, str(tmp_path), steps, batch, interval, limit, timeout=PATIENCE_S)
