"""NeMo's data module as training uses it, against the packed stream that its files hold."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.packed_stream import Blend, PackedStream
from tests.support.sessions import PATIENCE_S

LENGTHS = [5, 40, 1, 17, 3, 64, 9, 2, 28]
SEQ_LENGTH = 8
EOD, BOS, COMMON = 0, 7, 33
FAR = 100_000  # items from a run's beginning
DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"


def write_split(prefix: str, first: int) -> None:
    """Documents of ids below 256, each ended by EOD and begun by BOS where it is long enough."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in LENGTHS:
        ids = np.arange(first, first + length) % 200 + 20
        ids[-1] = EOD
        if length > 2:
            ids[0] = BOS
        builder.add_document(torch.from_numpy(ids), [length])
        first += length
    builder.finalize(f"{prefix}.idx")


def corpus(directory: str) -> Any:
    for number, name in enumerate(("train", "valid", "sdg")):
        write_split(f"{directory}/{name}", 50 * number)
    prefixes = {split: f"{directory}/{split}" for split in ("train", "valid")}
    return SimpleNamespace(
        train_prefix=prefixes["train"],
        valid_prefix=prefixes["valid"],
        prefix=prefixes.get,
        paths=lambda split: [prefixes[split]],
        eod=EOD,
    )


def tokenizer_with(directory: str, pad: int | None) -> Any:
    """NeMo's, of the demo teacher, with another padding token."""
    from transformers import AutoTokenizer

    from nemo_minitron.nemo.session import nemo_tokenizer

    path = f"{directory}/tokenizer-{pad}"
    shutil.copytree(DEMO, path, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(path)
    found = nemo_tokenizer(path)
    assert (found.eod, found.pad) == (EOD, pad)
    return found


def is_the_stream(dataset: Any, expected: Any, numbers: Any) -> None:
    for number in numbers:
        item, tokens = dataset[number], torch.from_numpy(expected.item(number).astype(np.int64))
        assert torch.equal(item["tokens"], tokens[:-1]), number
        assert torch.equal(item["labels"], tokens[1:]), number
        assert torch.equal(item["loss_mask"], torch.ones(SEQ_LENGTH)), number
        assert torch.equal(item["position_ids"], torch.arange(SEQ_LENGTH)), number
        assert "attention_mask" not in item


def whatever_pads(directory: str, pads: list[int | None], text: bool) -> None:
    """`text`: a blend of the corpus with a teacher's text."""
    from nemo_minitron.config.recipes import DataConfig
    from nemo_minitron.nemo.trainer import training_data

    indexed, d = corpus(directory), DataConfig(seq_length=SEQ_LENGTH, seed=5)
    layout = SimpleNamespace(micro_batch_size=1, global_batch_size=10)
    train = ["0.25", f"{directory}/sdg", "0.75", indexed.train_prefix] if text else None
    for number, pad in enumerate(pads):
        cache = f"{directory}/order-{number}"
        module = training_data(indexed, tokenizer_with(directory, pad), d, layout, cache, train)
        module.build(FAR // 10 + 2, 500, 1, 0)
        expected: Any = PackedStream(cache, indexed.train_prefix, SEQ_LENGTH, "train")
        if text:
            sdg = PackedStream(cache, f"{directory}/sdg", SEQ_LENGTH, "train")
            expected = Blend(cache, [sdg, expected])
        assert len(module._train_ds) == len(expected) > FAR + 10
        is_the_stream(module._train_ds, expected, [*range(1001), *range(FAR - 10, FAR + 10)])
        valid = PackedStream(cache, indexed.valid_prefix, SEQ_LENGTH, "valid")
        is_the_stream(module._validation_ds, valid, range(100))


@pytest.mark.parametrize("text", [False, True], ids=["corpus", "blend"])
def test_a_padding_token_is_text_like_any_other(run_on_ranks, tmp_path, text):
    """The padding token missing, or the end of a document, its beginning, or a token of the text."""
    pads = [EOD, COMMON] if text else [None, EOD, BOS, COMMON]
    run_on_ranks(1, whatever_pads, str(tmp_path), pads, text, timeout=PATIENCE_S)


def schedules_are_kept(directory: str, cases: list[tuple[int, int, int, int]]) -> None:
    from nemo_minitron.config.recipes import DataConfig
    from nemo_minitron.data.sequences import SplitSequences, schedules
    from nemo_minitron.nemo.trainer import training_data

    indexed, d = corpus(directory), DataConfig(seq_length=SEQ_LENGTH, seed=5)
    data = SimpleNamespace(indexed=indexed, index_cache=f"{directory}/ours")
    tokenizer = tokenizer_with(directory, EOD)
    for number, (steps, batch, interval, limit) in enumerate(cases):
        layout = SimpleNamespace(micro_batch_size=1, global_batch_size=batch)
        module = training_data(indexed, tokenizer, d, layout, f"{directory}/theirs-{number}")
        module.build(steps, interval or steps, limit, 0)
        for split, dataset in (("train", module._train_ds), ("valid", module._validation_ds)):
            schedule = schedules(steps, batch, interval, limit)[split]
            ours = SplitSequences(data, d, split, schedule.drawn)
            theirs = PackedStream(f"{directory}/theirs-{number}", indexed.prefix(split), SEQ_LENGTH, split)
            assert len(ours.dataset) == len(dataset) == len(theirs) >= schedule.used
            for item in range(len(dataset)):
                assert ours.tokens(item).tolist() == theirs.item(item)[:-1].tolist()


def blends_are_dealt_out(directory: str, cases: list[tuple[int, int, int, int]]) -> None:
    """`data=blend`: NeMo's module, and what a cache of the teacher reads, over two corpora and both splits."""
    from nemo_minitron.config.recipes import DataConfig
    from nemo_minitron.data.sequences import SplitSequences, schedules
    from nemo_minitron.nemo.trainer import training_data

    corpus(directory)
    pairs = {"train": ("train", "sdg"), "valid": ("valid", "sdg")}
    paths = {split: [f"{directory}/{name}" for name in names] for split, names in pairs.items()}
    indexed = SimpleNamespace(
        paths=lambda split: ["0.7", paths[split][0], "0.3", paths[split][1]],
        train_prefix=None,
        valid_prefix=None,
        eod=EOD,
    )
    d, tokenizer = DataConfig(seq_length=SEQ_LENGTH, seed=5), tokenizer_with(directory, EOD)
    for number, (steps, batch, interval, limit) in enumerate(cases):
        layout = SimpleNamespace(micro_batch_size=1, global_batch_size=batch)
        cache = f"{directory}/theirs-{number}"
        module = training_data(indexed, tokenizer, d, layout, cache)
        module.build(steps, interval or steps, limit, 0)
        data = SimpleNamespace(indexed=indexed, index_cache=f"{directory}/ours-{number}")
        for split, dataset in (("train", module._train_ds), ("valid", module._validation_ds)):
            schedule = schedules(steps, batch, interval, limit)[split]
            ours = SplitSequences(data, d, split, schedule.drawn)
            streams = [PackedStream(cache, prefix, SEQ_LENGTH, split) for prefix in paths[split]]
            theirs = Blend(cache, streams, split)
            assert len(ours.dataset) == len(dataset) == len(theirs) >= schedule.used
            shares = np.bincount(theirs.which[: schedule.used], minlength=2) - schedule.used * np.array(
                [0.7, 0.3]
            )
            assert abs(shares).max() <= 1
            is_the_stream(dataset, theirs, range(len(theirs)))
            for item in range(len(dataset)):
                assert ours.tokens(item).tolist() == theirs.item(item)[:-1].tolist()


def test_the_sequences_of_a_blend(run_on_ranks, tmp_path):
    run_on_ranks(1, blends_are_dealt_out, str(tmp_path), [(5, 4, 0, 1), (20, 4, 3, 2)], timeout=PATIENCE_S)


def test_the_sequences_that_a_run_is_said_to_read(run_on_ranks, tmp_path):
    """Epochs have 21 sequences."""
    cases = [(5, 4, 0, 1), (20, 4, 3, 2), (7, 13, 7, 5), (11, 2, 50, 1)]
    run_on_ranks(1, schedules_are_kept, str(tmp_path), cases, timeout=PATIENCE_S)
