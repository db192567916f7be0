"""Samples on disk, prompts of files and corpora, and what distillation asks of a teacher's text."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.config.synthesize import SynthesizeConfig, check_settings, sampling
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.prepare import prepare_data
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.synthesis.mixture import check_mixture, prepare_text
from nemo_minitron.synthesis.prompts import openings, read_prompts
from nemo_minitron.synthesis.store import Store, Written, batch_seed

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "assets" / "demo-teacher"
MANIFEST = {"seed": 1, "temperature": 1.0}


def sample(index: int) -> Written:
    return Written(index, [0, 5], [index, 7], False, 0.1 * index)


# ---- store -------------------------------------------------------------------------------------------------


def test_samples_come_back_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples", MANIFEST, 3)
    store.begin()
    for number in (2, 0, 1):
        store.write(number, [sample(2 * number), sample(2 * number + 1)])
    assert store.missing() == []
    assert list(store.read()) == [sample(i) for i in range(6)]


def test_what_a_kill_left_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples", MANIFEST, 3)
    store.begin()
    store.write(1, [sample(0)])
    (tmp_path / "samples" / "batch-000002.99.tmp").write_text('{"index": 2, "pro')
    again = Store(tmp_path / "samples", MANIFEST, 3)
    again.check()
    again.begin()
    assert again.missing() == [0, 2]


def test_samples_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    Store(tmp_path / "samples", MANIFEST, 1).begin()
    other = Store(tmp_path / "samples", {**MANIFEST, "temperature": 0.5}, 1)
    with pytest.raises(InputError, match="temperature 1.0, now 0.5.*overwrite=true") as caught:
        other.check()
    assert "seed" not in str(caught.value)
    other.write(0, [sample(0)])
    other.begin()  # after overwrite=true
    assert other.missing() == [0]
    other.check()


def test_a_batch_s_seed_is_its_own() -> None:
    seeds = {batch_seed(seed, number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_filters_do_not_decide_the_text() -> None:
    """So that other filters can be tried on the same samples."""
    own = SynthesizeConfig(temperature=0.5)
    assert sampling(own) == sampling(SynthesizeConfig(temperature=0.5, min_new_tokens=1, max_repetition=0.1))
    assert sampling(own) != sampling(SynthesizeConfig())
    for key in ("backend", "samples", "batch_size", "max_new_tokens", "top_p", "top_k", "prompts"):
        assert key in sampling(own)


# ---- settings ----------------------------------------------------------------------------------------------

REFUSED = {
    "no opening": ({"opening_tokens": 0, "openings": "sequences"}, ["synthesize.opening_tokens=0"]),
    "all too short": ({"min_new_tokens": 9, "max_new_tokens": 8}, ["min_new_tokens=9", "max_new_tokens=8"]),
    "both": ({"top_k": 5, "top_p": 0.9}, ["synthesize.top_k=5", "synthesize.top_p=0.9"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_no_backend_has_are_refused(name: str) -> None:
    values, says = REFUSED[name]
    with pytest.raises(InputError) as caught:
        check_settings(SynthesizeConfig(**values), TrainerConfig())
    for part in says:
        assert part in str(caught.value)


def test_only_megatron_writes_on_several_ranks() -> None:
    two = TrainerConfig(tensor_model_parallel_size=2)
    check_settings(SynthesizeConfig(), two)
    with pytest.raises(InputError, match="backend=huggingface: runs in one process.*megatron"):
        check_settings(SynthesizeConfig(backend="huggingface"), two)


# ---- prompts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TEACHER)


def test_prompts_of_a_text_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("def f(x):\r\n\n  \nimport os, sys # é, à\n".encode())
    prompts = read_prompts(str(path), "prompt", tokenizer)
    assert [tokenizer.decode(p[1:]) for p in prompts.tokens] == ["def f(x):", "import os, sys # é, à"]
    assert all(p[0] == tokenizer.eos_token_id for p in prompts.tokens)
    assert prompts.places[1].endswith("prompts.txt, line 4")
    first, second = map(len, prompts.tokens)
    assert second > first
    prompts.check_room(60, second + 60)
    says = f"line 4: a prompt of {second} tokens and .*=60 are more than .* context of {first + 60}"
    with pytest.raises(InputError, match=says):
        prompts.check_room(60, first + 60)


def test_special_tokens_in_a_prompt_are_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "<|endoftext|>"}) + "\n")
    (tokens,) = read_prompts(str(path), "prompt", tokenizer).tokens
    assert tokens.count(tokenizer.eos_token_id) == 1


BAD = {
    "no json": (b'{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON"),
    "no key": (b'{"text": "a"}\n', "line 1: must be a JSON object whose 'prompt' is a string"),
    "no object": (b"[1]\n", "line 1: expected a JSON object"),
    "no text": (b'{"prompt": 3}\n', "line 1: must be"),
    "not utf-8": (b'{"prompt": "a"}\n\xff\n', "line 2: not UTF-8"),
    "a surrogate": (b'{"prompt": "\\ud800"}\n', "line 1: .*surrogate"),
    "empty": (b"\n\n", "holds no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prompt_is_refused_with_its_line(name: str, tokenizer: Any, tmp_path: Path) -> None:
    content, says = BAD[name]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_prompts(str(path), "prompt", tokenizer)
    with pytest.raises(InputError, match="missing.jsonl: cannot be read"):
        read_prompts(str(tmp_path / "missing.jsonl"), "prompt", tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    home = tmp_path_factory.mktemp("corpus")
    texts = [f"document {i}: " + " ".join(str(i * j) for j in range(40)) for i in range(1, 9)]
    (home / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, "short"]))
    (home / "valid.jsonl").write_text(json.dumps({"text": "held out " * 40}) + "\n")
    return DataConfig(
        name="files",
        train=str(home / "train.jsonl"),
        valid=str(home / "valid.jsonl"),
        seq_length=64,
        cache_dir=str(home / "cache"),
    )


def test_openings_are_the_beginnings_of_documents(data: DataConfig, tokenizer: Any) -> None:
    indexed = prepare_data(data, str(TEACHER)).indexed
    lines = [json.loads(line)["text"] for line in Path(data.train).read_text().splitlines()]

    def made(seed: int, samples: int = 99, of: str = "documents", length: int = 12) -> list[list[int]]:
        options: dict[str, Any] = {"of": of, "length": length, "seq_length": 64, "samples": samples}
        return openings(indexed, **options, seed=seed).tokens

    found = made(1)
    expected = [[0, *tokenizer.encode(line)[:12]] for line in lines[:-1]]  # the last is too short
    assert sorted(found) == sorted(expected)
    assert made(1) == found != made(2)
    assert made(1, samples=3) == found[:3]

    stream = [token for line in lines for token in [*tokenizer.encode(line), tokenizer.eos_token_id]]
    pieces = [stream[i : i + 12] for i in range(0, len(stream) - 63, 64)]
    assert sorted(made(1, of="sequences")) == sorted(pieces)
    with pytest.raises(InputError, match="opening_tokens=5000"):
        made(1, length=5000)


# ---- the teacher's text beside a corpus ----------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    rows = [{"text": f"written {i} " * 20, "index": i} for i in range(5)]
    (tmp_path / "text" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "result.json").write_text("{}")
    return tmp_path


def tokens_of(prefix: str) -> list[int]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [int(token) for document in IndexedDataset(prefix) for token in document]


def test_the_text_is_trained_on_and_the_corpus_s_held_out_split_stays(
    data: DataConfig, tokenizer: Any, run: Path
) -> None:
    corpus = prepare_data(data, str(TEACHER))
    alone, mixed = (prepare_text(str(run), weight, data, corpus) for weight in (1.0, 0.25))
    assert alone is not None
    assert mixed is not None
    (prefix,) = alone.paths(corpus)
    own = [t for i in range(5) for t in [*tokenizer.encode(f"written {i} " * 20), tokenizer.eos_token_id]]
    assert tokens_of(prefix) == own
    assert tokens_of(alone.indexed.valid_prefix) == tokens_of(corpus.indexed.valid_prefix)
    assert mixed.paths(corpus) == ["0.25", prefix, "0.75", corpus.indexed.train_prefix]
    again = prepare_text(str(run), 0.25, data, corpus, mixed.to_config())
    assert again == mixed
    assert prepare_text(None, 0.0, data, corpus) is None


def test_a_mixture_that_cannot_be_is_refused(run: Path, tmp_path: Path) -> None:
    check_mixture(None, 0.0)
    check_mixture(str(run), 1.0)
    with pytest.raises(InputError, match="sdg_weight=0.5: needs sdg=RUN"):
        check_mixture(None, 0.5)
    with pytest.raises(InputError, match="would not be read"):
        check_mixture(str(run), 0.0)
    (run / "result.json").unlink()
    with pytest.raises(InputError, match="did not finish"):
        check_mixture(str(run), 1.0)
    with pytest.raises(InputError, match=f"sdg={tmp_path / 'nowhere'}: no run directory"):
        check_mixture(str(tmp_path / "nowhere"), 1.0)
