"""The tokenizer that checkpoints get a copy of, and one of `data.tokenizer` beside a model's own."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.nemo.tokenizer_files import tokenizer_files
from nemo_minitron.workflows.preflight import check_vocabulary

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
TEXT = "def f(x):\n    return x + 12  # <|endoftext|>"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory as `huggingface-cli download` leaves it, with files of another form beside."""
    shutil.copytree(DEMO, tmp_path / "model")
    for place in (".cache/huggingface", "original"):
        (tmp_path / "model" / place).mkdir(parents=True)
        (tmp_path / "model" / place / "params.json").write_text("{}")
    return tmp_path / "model"


def test_checkpoints_get_the_tokenizer_s_files_alone(model: Path) -> None:
    """Not the weights; and NeMo, which copies file by file, would fail at a directory."""
    stops = {"eos_token_id": [0, 5], "temperature": 0.6, "top_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(stops))
    found = tokenizer_files(model)
    assert all(path.is_file() for path in found.iterdir())
    names = {path.name for path in found.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name == "config.json" or "safetensors" in name]
    assert sum(path.stat().st_size for path in found.iterdir()) < 200_000
    expected, kept = AutoTokenizer.from_pretrained(DEMO), AutoTokenizer.from_pretrained(found)
    assert kept.encode(TEXT) == expected.encode(TEXT)
    assert kept.get_vocab() == expected.get_vocab()
    assert json.loads((found / "generation_config.json").read_text()) == stops | {"bos_token_id": 0}


def test_a_copy_serves_as_it_is(model: Path) -> None:
    copy = tokenizer_files(model)
    assert tokenizer_files(str(copy)) == copy


def test_a_foreign_tokenizer_takes_the_model_s_generation_settings(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    load_tokenizer(DEMO).save_pretrained(str(tmp_path / "foreign"))
    found = tokenizer_files(str(tmp_path / "foreign"), model)
    assert json.loads((found / "generation_config.json").read_text())["eos_token_id"] == [0, 5]
    shutil.copytree(tmp_path / "foreign", tmp_path / "own")
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert tokenizer_files(str(tmp_path / "own"), model) == tmp_path / "own"


def changed(directory: Path, to: Path, change: Any) -> Path:
    """A copy of a tokenizer with another vocabulary."""
    shutil.copytree(directory, to)
    rules = json.loads((to / "tokenizer.json").read_text())
    change(rules["model"]["vocab"])
    (to / "tokenizer.json").write_text(json.dumps(rules))
    return to


def swap(vocabulary: dict[str, int]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_data_of_other_ids_is_refused(tmp_path: Path) -> None:
    """Scores, losses and students of such data would be of noise. What weights do not know yet does not matter."""
    source = find_source(DEMO)
    ids = load_tokenizer(DEMO).get_vocab()
    foreign = changed(DEMO, tmp_path / "swapped", swap)
    data: Any = SimpleNamespace(
        tokenizer_dir=str(foreign),
        tokenizer=load_tokenizer(foreign),
        indexed=SimpleNamespace(vocab_size=1024),
    )
    with pytest.raises(InputError) as caught:
        check_vocabulary(source, data)
    (number, own), (_, other) = sorted((ids[token], token) for token in "ab")
    assert str(caught.value) == (
        f"data.tokenizer={foreign}: id {number} is {other!r}, for the model {own!r}; must have the model's ids"
    )
    check_vocabulary(source, data, trained=False)
    data.indexed.vocab_size = 1025
    with pytest.raises(InputError, match="has 1025 entries, the model's vocabulary 1024"):
        check_vocabulary(source, data, trained=False)


def test_the_same_ids_by_other_rules_are_taken(tmp_path: Path) -> None:
    """A template or a beginning token that the model's own files lack is a reason to name another tokenizer."""
    own = load_tokenizer(DEMO)
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(str(tmp_path / "templated"))
    data: Any = SimpleNamespace(
        tokenizer_dir=str(tmp_path / "templated"),
        tokenizer=load_tokenizer(tmp_path / "templated"),
        indexed=SimpleNamespace(vocab_size=1024),
    )
    check_vocabulary(find_source(DEMO), data)
