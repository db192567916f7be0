"""Blends: Megatron's own dealing out, held to weights by numpy; what a part is, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from omegaconf import OmegaConf

from nemo_minitron.config.align import SftRecipe
from nemo_minitron.config.data import BlendPart, DataConfig
from nemo_minitron.config.recipes import DistillRecipe, PretrainRecipe, PruneRecipe, SearchRecipe, parse
from nemo_minitron.data.blend import IndexedBlend, one_pass, parts_of
from nemo_minitron.data.datasets import gpt_dataset
from nemo_minitron.data.indexed import MANIFEST
from nemo_minitron.data.prepare import open_corpus, prepare_data
from nemo_minitron.data.statistics import unigram_entropy_nats
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.preflight import say_repeats

TEACHER = str(Path(__file__).resolve().parents[2] / "assets" / "demo-teacher")
SEQ_LENGTH, EOD = 8, 100_000


def indexed(prefix: Path, first: int, tokens: int) -> str:
    """Documents of 7 ids that occur once."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for begin in range(first, first + tokens, 7):
        ids = torch.arange(begin, min(begin + 7, first + tokens))
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def dealt_out(weights: list[float], size: int) -> list[int]:
    """Which part each sequence is of: always the one that is furthest behind its share."""
    share, counts, order = np.array(weights) / sum(weights), np.zeros(len(weights)), []
    for number in range(size):
        chosen = int(np.argmax(share * max(number, 1) - counts))
        counts[chosen] += 1
        order.append(chosen)
    return order


@pytest.mark.parametrize(
    ("weights", "samples"), [([0.7, 0.3], 60), ([1.0, 1.0], None), ([5.0, 3.0, 2.0], None), ([0.9, 0.1], 200)]
)
def test_sequences_are_dealt_out_by_weights(
    weights: list[float], samples: int | None, tmp_path: Path, megatron: None
) -> None:
    lengths = [700, 350, 497][: len(weights)]
    prefixes = [indexed(tmp_path / f"p{n}", 10_000 * n, tokens) for n, tokens in enumerate(lengths)]
    paths = [text for pair in zip(map(str, weights), prefixes, strict=True) for text in pair]
    blend = gpt_dataset(paths, "train", samples, SEQ_LENGTH, 3, EOD, tmp_path / "cache")
    rows = np.array([blend[number]["tokens"].tolist() for number in range(len(blend))])
    assert (rows[:, 0] // 10_000).tolist() == dealt_out(weights, len(blend))
    counts = np.bincount(rows[:, 0] // 10_000)
    assert abs(counts - len(blend) * np.array(weights) / sum(weights)).max() <= 1
    if samples is None:
        assert len(np.unique(rows)) == rows.size, "a token twice in one pass"
        # Some part is read almost to its end.
        used = (counts + 3) / [(tokens - 1) // SEQ_LENGTH for tokens in lengths]
        assert used.max() >= 0.93
    else:
        assert len(blend) >= samples


def test_one_pass_reads_no_part_twice() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        parts = int(generator.integers(2, 7))
        weights = generator.dirichlet(np.ones(parts)).tolist()
        lengths = generator.integers(20, 3000, parts).tolist()
        size = one_pass(lengths, weights)
        drawn = np.bincount(dealt_out(weights, sum(int(np.ceil(size * w)) for w in weights)), minlength=parts)
        # At least 1, which may be more than a part with almost no weight has.
        assert size == 1 or (drawn <= lengths).all()
        assert (
            size >= min(length / weight for length, weight in zip(lengths, weights, strict=True)) * 0.9 - 10
        )


def files(directory: Path) -> dict[str, Path]:
    """Two corpora of one letter each."""
    made = {}
    for letter in "ab":
        made[letter] = directory / f"{letter}.jsonl"
        rows = [{"text": f"{letter * 3} {letter * 5}{number % 10}. " * 40} for number in range(60)]
        made[letter].write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / f"{letter}.txt").write_text(f"{letter * 4} held out. " * 100)
    return made


def blend_config(directory: Path, **changes: Any) -> DataConfig:
    made = files(directory)
    parts = [
        BlendPart(weight=3, train=str(made["a"]), valid=f"{directory}/a.txt"),
        BlendPart(weight=1, train=str(made["b"]), valid_fraction=0.2),
        BlendPart(weight=0, train="nothing"),
    ]
    return DataConfig(name="blend", blend=parts, seq_length=32, cache_dir=str(directory / "cache"), **changes)


def test_a_blend_is_indexed_part_by_part_and_found_again(tmp_path: Path) -> None:
    d = blend_config(tmp_path)
    data = prepare_data(d, TEACHER)
    blend = data.indexed
    assert isinstance(blend, IndexedBlend)
    assert blend.weights == (0.75, 0.25)
    a, b = blend.parts
    assert blend.paths("train") == ["0.75", a.train_prefix, "0.25", b.train_prefix]
    alone = prepare_data(
        DataConfig(
            name="files",
            train=str(tmp_path / "a.jsonl"),
            valid=f"{tmp_path}/a.txt",
            seq_length=32,
            cache_dir=d.cache_dir,
        ),
        TEACHER,
    )
    assert alone.indexed == a
    again = prepare_data(d, TEACHER, ready=data.to_config())
    assert again.indexed == blend
    assert again.index_cache == data.index_cache != alone.index_cache
    assert blend.bytes_per_token("valid") == pytest.approx(
        0.75 * a.bytes["valid"] / a.tokens["valid"] + 0.25 * b.bytes["valid"] / b.tokens["valid"]
    )
    other = prepare_data(blend_config(tmp_path, bad_records="skip"), TEACHER).indexed
    assert other == blend
    d.blend[0].weight = 1  # type: ignore[index]
    changed = prepare_data(d, TEACHER).indexed
    assert (changed.manifest_sha256, changed.directory) != (blend.manifest_sha256, blend.directory)
    texts = [document.text for document in open_corpus(d).splits["train"]]
    assert len(texts) == a.documents["train"] + b.documents["train"]
    (blend.directory / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match=r"manifest\.json: no manifest of a blend"):
        prepare_data(d, TEACHER, ready=data.to_config())


def test_the_entropy_of_a_blend_is_that_of_the_mixture(tmp_path: Path) -> None:
    one, other = indexed(tmp_path / "one", 0, 4), indexed(tmp_path / "other", 2, 2)
    frequencies = 0.25 * np.array([1, 1, 1, 1]) / 4 + 0.75 * np.array([0, 0, 1, 1]) / 2
    expected = -(frequencies * np.log(frequencies)).sum()
    assert unigram_entropy_nats(["1", one, "3", other]) == pytest.approx(expected, rel=1e-12)


BAD_BLENDS: dict[str, tuple[list[dict[str, Any]] | None, str]] = {
    "none": (None, r"data\.blend is missing: data=blend needs a list of corpora"),
    "all zero": (
        [{"weight": 0, "name": "stdlib"}, {"weight": 0.0}],
        "the weights 0, 0 add up to 0; one at least must be positive",
    ),
    "no file": ([{"weight": 1, "train": "no/*.txt"}], r"data\.blend\[0\]\.train=no/\*\.txt: matches no file"),
    "no train": (
        [{"weight": 0}, {"weight": 1}],
        r"data\.blend\[1\]\.train is missing: data\.blend\[1\]\.name=files",
    ),
    "no corpus": ([{"weight": 1, "name": "blend"}], r"data\.blend\[0\]\.name=blend: no such corpus"),
    "foreign key": (
        [{"weight": 1, "name": "stdlib", "train": "a"}],
        r"data\.blend\[0\]\.train=a: is of data=files, but data\.blend\[0\]\.name=stdlib was chosen",
    ),
    "held out here, trained on there": (
        [{"weight": 1, "train": "a.jsonl", "valid": "a.txt"}, {"weight": 1, "train": "a.txt"}],
        r"data\.blend\[0\]\.valid: .*a\.txt is .*a\.txt of data\.blend\[1\]\.train",
    ),
    "too short": (
        [{"weight": 1, "train": "short.txt", "valid": "a.txt"}],
        r"data\.blend\[0\]: the train split",
    ),
}


@pytest.mark.parametrize("case", BAD_BLENDS)
def test_what_is_no_blend_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, says = BAD_BLENDS[case]
    files(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.chdir(tmp_path)
    blend = None if parts is None else [BlendPart(**part) for part in parts]
    with pytest.raises(InputError, match=says) as caught:
        prepare_data(DataConfig(name="blend", blend=blend, cache_dir=str(tmp_path / "c")), TEACHER)
    assert len(str(caught.value).splitlines()) == 1


def test_keys_of_one_corpus_beside_a_blend_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train=x: is of data=files, but data\.name=blend was chosen"):
        parts_of(blend_config(tmp_path, train="x"))
    with pytest.raises(
        InputError, match=r"data\.blend=.*: is of data=blend, but data\.name=stdlib was chosen"
    ):
        open_corpus(DataConfig(blend=[BlendPart(weight=1)]))


def parsed(schema: Any, **settings: Any) -> Any:
    trainer = {"max_steps": 5, "global_batch_size": 8, "micro_batch_size": 8}
    values = {"run_dir": "runs/x", "trainer": trainer, **settings}
    return parse(schema, OmegaConf.create(values))


@pytest.mark.parametrize(
    ("blend", "says"),
    [
        ("a.jsonl", r"data\.blend=a\.jsonl: must be a list"),
        (["a.jsonl"], r"data\.blend\[0\]=a\.jsonl: must be a group of settings"),
        ([{"weight": -1}], r"data\.blend\[0\]\.weight=-1\.0: must be a finite number at least 0"),
        ([{"weight": 1}, {"weight": float("nan")}], r"data\.blend\[1\]\.weight=nan"),
        ([{"weight": 1, "train": 3}], r"data\.blend\[0\]\.train=3: must be a path or glob"),
        ([{"train": "a"}], "weight"),
        ([{"weight": 1, "tokens": 3}], "tokens"),
    ],
)
def test_the_schema_of_a_blend(blend: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parsed(PruneRecipe, source="x", data={"name": "blend", "blend": blend})


def test_a_budget_of_tokens_stands_for_steps_and_samples() -> None:
    data = {"tokens": 1_000_000, "seq_length": 128}
    distill = {"max_steps": 300, "global_batch_size": 8}
    assert parsed(DistillRecipe, student="x", distill=distill, data=data).distill.max_steps == 976
    assert parsed(PretrainRecipe, data=data, model=MODEL).trainer.max_steps == 976
    for schema in (PruneRecipe, SearchRecipe):
        more = {"distill": distill} if schema is SearchRecipe else {}
        assert parsed(schema, source="x", data=data, **more).prune.calibration_samples == 7812
    with pytest.raises(InputError, match="tokens=1000: must be at least 1024, 8 x data.seq_length 128"):
        parsed(DistillRecipe, student="x", distill=distill, data={**data, "tokens": 1000})
    with pytest.raises(InputError, match="tokens=1000000: only pretrain, prune, .* must be null here"):
        parsed(SftRecipe, student="x", data=data)


MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
}


def test_a_budget_that_needs_repeats_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    d = blend_config(tmp_path, tokens=1)
    data = prepare_data(d, TEACHER)
    assert isinstance(data.indexed, IndexedBlend)
    a, b = (part.tokens["train"] for part in data.indexed.parts)
    say_repeats(d, data, min(a / 0.75, b / 0.25) - 4, prepared=False)
    assert not caplog.records
    say_repeats(d, data, 12 * b, prepared=False)
    (record,) = caplog.records
    times = f"data.blend[0] {9 * b / a:.2f} times, data.blend[1] 3.00 times"
    assert record.getMessage() == (
        f"data: {12 * b:,} tokens are more than the data has without repeats: it is read on: {times}"
    )
