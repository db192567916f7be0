"""The indexed corpus: the files on disk come back from it, and it is there whole or not at all."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemo_minitron.data import indexed as module
from nemo_minitron.data.beginning import beginning
from nemo_minitron.data.corpora import load_corpus
from nemo_minitron.data.corpus import Corpus, Document, Stream
from nemo_minitron.data.indexed import IndexedCorpus, build_indexed
from nemo_minitron.data.tokenizer import EOS, train_bpe
from nemo_minitron.errors import InputError
from tests.support.packed_stream import documents

SOURCES = sorted(Path(json.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe((path.read_text() for path in SOURCES), 512, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    texts = {path.name: path.read_text() for path in SOURCES} | {
        "odd.txt": f"é\r\n\t {EOS} 1️⃣ {EOS}",
        "two.txt": "x",
    }
    for name, text in texts.items():
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_bytes(text.encode())
    directory = tmp_path / "text"
    return load_corpus({"name": "files", "train": f"{directory}/[!d]*", "valid": f"{directory}/d*.py"})


def test_the_files_come_back(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 4000)
    indexed = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    for split, pattern in (("train", "[!d]*"), ("valid", "d*.py")):
        files = sorted((tmp_path / "text").glob(pattern))
        data = IndexedDataset(indexed.prefix(split))
        assert len(data) == len(files) == indexed.documents[split]
        for number, file in enumerate(files):
            ids = data[number].tolist()
            assert ids[-1] == 0
            assert 0 not in ids[:-1], "a document's end inside of it"
            assert tokenizer.decode(ids[:-1]).encode() == file.read_bytes()
        assert indexed.tokens[split] == sum(len(data[number]) for number in range(len(data)))
        assert indexed.bytes[split] == sum(file.stat().st_size for file in files)
        assert data.index.dtype == np.uint16
    assert (indexed.eod, indexed.vocab_size) == (0, 512)
    assert indexed.manifest_sha256 == corpus.manifest_sha256


def test_wide_vocabularies_get_wide_integers(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 128_256)
    indexed = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    assert IndexedDataset(indexed.valid_prefix).index.dtype == np.int32


def _refuse_to_build(*_: object) -> None:
    raise AssertionError("built again")


def test_cached_by_content(corpus, tokenizer, tmp_path, monkeypatch):
    first = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_build", _refuse_to_build)
        assert build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=32) == first
    (tmp_path / "text" / "two.txt").write_text("y")
    changed = load_corpus(
        {"name": "files", "train": f"{tmp_path}/text/[!d]*", "valid": f"{tmp_path}/text/d*.py"}
    )
    assert (
        build_indexed(changed, tokenizer, tmp_path / "cache", seq_length=64).train_prefix
        != first.train_prefix
    )
    larger = train_bpe((path.read_text() for path in SOURCES), 640, tmp_path / "larger")
    assert build_indexed(corpus, larger, tmp_path / "cache", seq_length=64).train_prefix != first.train_prefix


def test_the_manifest_moves_with_its_directory(corpus, tokenizer, tmp_path):
    built = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    directory = Path(built.train_prefix).parent
    moved = directory.rename(tmp_path / "moved")
    read = IndexedCorpus.from_json(moved / "manifest.json")
    assert read.prefix("valid") == str(moved / "valid")
    assert read.tokens == built.tokens
    assert IndexedDataset(read.train_prefix).sequence_lengths.sum() == built.tokens["train"]


def test_a_shared_cache_is_open_to_others(corpus, tokenizer, tmp_path):
    built = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    (tmp_path / "ordinary").mkdir()
    assert Path(built.train_prefix).parent.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failed_build_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    add = IndexedDatasetBuilder.add_document
    calls = []

    def fails_at_the_fourth(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("disk on fire")
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(IndexedDatasetBuilder, "add_document", fails_at_the_fourth)
        with pytest.raises(RuntimeError, match="disk on fire"):
            build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64).documents["valid"] == 1


def _killed_while_building(corpus: Corpus, tokenizer, cache: Path) -> None:
    IndexedDatasetBuilder.finalize = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    build_indexed(corpus, tokenizer, cache, seq_length=64)


def test_a_killed_build_is_redone(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    cache = tmp_path / "cache"
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_building, args=(corpus, tokenizer, cache)
    )
    process.start()
    process.join(30)
    assert process.exitcode == -9
    left = [path for path in cache.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert ".tmp-" in left[0].name
    indexed = build_indexed(corpus, tokenizer, cache, seq_length=64)
    assert [path for path in cache.iterdir() if path.is_dir()] == [Path(indexed.train_prefix).parent]


@pytest.mark.parametrize("damage", ["short", "absent", "manifest", "version", "bin", "idx"])
def test_a_damaged_corpus_is_redone(corpus, tokenizer, tmp_path, damage, capsys):
    built = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    files = {path.name: path for path in Path(built.train_prefix).parent.iterdir()}
    whole = {name: path.read_bytes() for name, path in files.items()}
    if damage == "short":
        files["train.bin"].write_bytes(whole["train.bin"][:-2])
    elif damage == "absent":
        files["valid.idx"].unlink()
    elif damage in ("bin", "idx"):
        flipped = bytearray(whole[f"train.{damage}"])
        flipped[len(flipped) // 2] ^= 1
        files[f"train.{damage}"].write_bytes(flipped)
    elif damage == "manifest":
        files["manifest.json"].write_bytes(whole["manifest.json"][:40])
    else:
        files["manifest.json"].write_bytes(
            whole["manifest.json"].replace(b'"format_version": 2', b'"format_version": 1')
        )
    with pytest.raises(InputError, match=str(files["manifest.json"].parent)):
        IndexedCorpus.from_json(files["manifest.json"]).verify()
    assert build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64) == built
    assert "; built again" in capsys.readouterr().err
    assert {name: path.read_bytes() for name, path in files.items()} == whole


def _build_and_report(corpus: Corpus, tokenizer, cache: Path, together, results) -> None:
    together.wait(30)
    results.put(build_indexed(corpus, tokenizer, cache, seq_length=4))


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once(tokenizer, tmp_path, monkeypatch, locks):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    walks = tmp_path / "walks"

    def slowly():
        with walks.open("a") as file:
            file.write("walk\n")
        for number in range(4):
            time.sleep(0.05)
            yield Document(str(number), f"text {number} " * 9)

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    if not locks:
        monkeypatch.setattr(module.fcntl, "flock", no_locks)
    corpus = Corpus("slow", {"train": Stream(slowly), "valid": [Document("v", "held out")]})
    assert corpus.manifest_sha256
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(2), context.Queue()
    arguments = (corpus, tokenizer, tmp_path / "cache", together, results)
    processes = [context.Process(target=_build_and_report, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    built = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert built[0] == built[1]
    assert walks.read_text().count("walk") == 1 + (1 if locks else 2), (
        "one walk for the hash, then one a build"
    )
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [
        Path(built[0].train_prefix).parent
    ]
    assert IndexedDataset(built[0].train_prefix).sequence_lengths.sum() == built[0].tokens["train"]


def test_an_empty_split(tokenizer, tmp_path):
    for empty, other in (("train", "valid"), ("valid", "train")):
        corpus = Corpus("c", {empty: [], other: [Document("a", "text")]})
        with pytest.raises(InputError, match=f"the {empty} split of corpus c is empty"):
            build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=4)


def test_shorter_than_one_sequence(tokenizer, tmp_path):
    corpus = Corpus("c", {"train": [Document("a", "1" * 64)], "valid": [Document("v", "1" * 31)]})
    # A digit is a token: 31 and the end of the document make 32, so a sequence of 31 and its last label fit.
    assert build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=31).tokens == {
        "train": 65,
        "valid": 32,
    }
    with pytest.raises(
        InputError, match="the valid split of corpus c has 32 tokens, but one sequence needs 33"
    ):
        build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=32)
    with pytest.raises(
        InputError, match="the train split of corpus c has 65 tokens, but one sequence needs 101"
    ):
        build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=100)


def test_progress_of_a_long_build(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    indexed = build_indexed(corpus, tokenizer, tmp_path / "cache", seq_length=64)
    captured = capsys.readouterr()
    assert f"tokenizing files/train: {indexed.tokens['train']:,} tokens" in captured.err
    assert captured.out == ""


def with_beginning(tokenizer, directory, template: str | None, **names: str):
    """The tokenizer with a beginning and an end of its own; `template`: what it adds by itself, with no flag for it."""
    from tokenizers import processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    if template:
        special = [
            (token, made.convert_tokens_to_ids(token)) for token in names.values() if token in template
        ]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    made.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


NAMES = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize(
    ("template", "names", "bos", "expected"),
    [
        ("<bos> $A", NAMES, "auto", ["<bos>"]),
        ("<bos> $A <eos>", NAMES, "auto", ["<bos>"]),
        ("<bos> $A", NAMES, True, ["<bos>"]),
        ("<bos> $A", NAMES, False, []),
        (None, NAMES, "auto", []),
        (None, NAMES, True, ["<bos>"]),
        ("$A <eos>", {"eos_token": "<eos>"}, "auto", []),
    ],
)
def test_documents_begin_as_the_tokenizer_begins_them(tokenizer, tmp_path, template, names, bos, expected):
    """Three documents, as the index file has them and as the tokenizer makes them."""
    own = with_beginning(tokenizer, tmp_path / "own", template, **names)
    begin = [own.convert_tokens_to_ids(token) for token in expected]
    texts = ["one", "two <bos> two", "three"]
    splits = {split: [Document(str(n), text) for n, text in enumerate(texts)] for split in ("train", "valid")}
    indexed = build_indexed(Corpus("three", splits), own, tmp_path / "cache", seq_length=4, bos=bos)
    assert (indexed.beginning, indexed.eod) == (begin, own.convert_tokens_to_ids("<eos>"))
    stored = [document.tolist() for document in documents(indexed.train_prefix)]
    assert sum(map(len, stored)) == indexed.tokens["train"]
    assert [ids[: len(begin)] for ids in stored] == [begin] * 3
    assert [own.decode(ids[len(begin) : -1]) for ids in stored] == texts
    if template and bos == "auto":
        whole = [own(text)["input_ids"] for text in ("one", "three")]
        end = [] if "<eos>" in template else [indexed.eod]
        assert [stored[0], stored[2]] == [[*ids, *end] for ids in whole]


def test_the_beginning_names_the_cache(tokenizer, tmp_path):
    own = with_beginning(tokenizer, tmp_path / "own", "<bos> $A", **NAMES)
    splits = {split: [Document("1", "some text")] for split in ("train", "valid")}
    found = {
        bos: build_indexed(Corpus("c", splits), own, tmp_path / "cache", seq_length=2, bos=bos).train_prefix
        for bos in ("auto", True, False)
    }
    assert found["auto"] == found[True] != found[False]


def test_a_beginning_that_is_none(tokenizer, tmp_path):
    own = with_beginning(tokenizer, tmp_path / "own", None, eos_token="<eos>")
    with pytest.raises(InputError, match=r"data\.bos=true: the tokenizer has no beginning token"):
        beginning(own, True)
    with pytest.raises(InputError, match=r"data\.bos=maybe: must be auto"):
        beginning(own, "maybe")
