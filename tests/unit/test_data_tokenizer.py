"""Tokenizers: lossless, exact in size, deterministic, read by transformers, and without anybody's code."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_minitron.data.tokenizer import EOS, PAD, load_tokenizer, tokenizer_sha256, train_bpe
from nemo_minitron.errors import InputError

TEXTS = [Path(json.__file__).read_text(), Path(shutil.__file__).read_text()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(TEXTS), 512, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


code = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "\t", "\n", "\r\n", " " * 7, "\t\t ", "def f(x):", "'s", "0123", "x_y", EOS, PAD]
        ),
        st.text(max_size=8),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=code)
def test_round_trip(tokenizer, text):
    for split_special_tokens in (False, True):
        ids = tokenizer(text, split_special_tokens=split_special_tokens)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token(tokenizer):
    # All code points of one and two UTF-8 bytes, and some of three and four.
    text = "".join(map(chr, range(0x800))) + "\u20ac\uffff\U0001f600\U0010ffff"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_size_and_special_tokens(directory, tokenizer):
    assert len(tokenizer) == 512
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (EOS, EOS, PAD)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    names = {path.name for path in directory.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    plain = AutoTokenizer.from_pretrained(directory)
    assert isinstance(plain, PreTrainedTokenizerFast)
    # Nothing is added around a text: who packs documents says where they end.
    assert plain("import os")["input_ids"] == tokenizer("import os", add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_text_can_be_read_as_text(tokenizer):
    text = f"a{EOS}b{PAD}"
    assert not {0, 1} & set(tokenizer(text, split_special_tokens=True)["input_ids"])


def test_code_compresses(tokenizer):
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]

    assert pieces("\n        return")[-2:] == [" " * 7, " return"]
    assert pieces(" 1024") == [" ", "1", "0", "2", "4"]


def test_deterministic(directory, tmp_path):
    train_bpe(TEXTS, 512, tmp_path)
    for path in directory.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_sha256_names_the_content(directory, tokenizer, tmp_path):
    before = tokenizer_sha256(tokenizer)
    shutil.copytree(directory, tmp_path / "copy")
    assert tokenizer_sha256(load_tokenizer(tmp_path / "copy")) == before
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2, split_special_tokens=True)
    assert tokenizer_sha256(tokenizer) == before
    others = {tokenizer_sha256(train_bpe(TEXTS, 640, tmp_path / "larger"))}
    others.add(tokenizer_sha256(train_bpe(TEXTS[:1] * 2 + ["zzzz " * 999], 512, tmp_path / "other")))
    changed = load_tokenizer(directory)
    changed.eos_token = PAD
    others.add(tokenizer_sha256(changed))
    assert len(others | {before}) == 4


@pytest.mark.parametrize(
    ("size", "texts", "says"),
    [(257, TEXTS, "at least 258"), (512, ["abc"], "only 2[56]. entries"), (512, [], "only 258")],
)
def test_bad_sizes(tmp_path, size, texts, says):
    with pytest.raises(InputError, match=f"data.vocab_size={size}: .*{says}"):
        train_bpe(texts, size, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_directories(directory, tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(f"{tmp_path}/absent")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    broken = Path(shutil.copytree(directory, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(broken)


def test_a_tokenizer_that_cannot_end_a_document(directory, tmp_path):
    endless = Path(shutil.copytree(directory, tmp_path / "endless"))
    config = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    (endless / "special_tokens_map.json").unlink()
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(endless)


def test_no_code_of_a_tokenizer_is_run(directory, tmp_path):
    evil = Path(shutil.copytree(directory, tmp_path / "evil"))
    ran = tmp_path / "ran"
    (evil / "mine.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w')\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((evil / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(evil)
    assert not ran.exists()
