"""Corpora: what is on disk is what is read, on the side of the split where it belongs."""

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from nemo_minitron.data.corpora import load_corpus
from nemo_minitron.data.corpus import Corpus, Document
from nemo_minitron.data.stdlib import stdlib_corpus
from nemo_minitron.errors import InputError


@pytest.fixture(scope="module")
def stdlib() -> dict[str, list[Document]]:
    corpus = load_corpus({"name": "stdlib"})
    return {split: list(corpus.splits[split]) for split in ("train", "valid")}


def test_stdlib_is_the_files_on_disk(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    for document in stdlib["train"]:
        assert (root / document.path).read_bytes() == document.text.encode()
    # Of the held-out ones some lines are left out, and nothing is added.
    for document in stdlib["valid"]:
        lines = iter((root / document.path).read_bytes().decode().split("\n"))
        assert all(line in lines for line in document.text.split("\n"))


def test_no_long_line_of_the_held_out_library_was_trained_on(stdlib):
    """3.04 % of those of 40 characters and more were, rulers and licences first; 0.8 % of all lines are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def long_lines(texts):
        return [
            " ".join(line.split()) for text in texts for line in text.split("\n") if len(line.strip()) > 44
        ]

    trained_on = set(long_lines(d.text for d in stdlib["train"]))
    whole = [(root / d.path).read_bytes().decode() for d in stdlib["valid"]]
    copies = [line for line in long_lines(whole) if line in trained_on]
    assert copies
    assert not trained_on & set(long_lines(d.text for d in stdlib["valid"]))
    before, after = (
        sum(text.count("\n") for text in texts) for texts in (whole, [d.text for d in stdlib["valid"]])
    )
    assert 0.985 * before < after <= before - len(copies)


def test_stdlib_holds_what_a_newcomer_expects(stdlib):
    paths = {document.path for split in stdlib.values() for document in split}
    assert {"argparse.py", "asyncio/tasks.py", "unittest/mock.py", "encodings/idna.py"} <= paths


def test_stdlib_leaves_out_tests_tables_and_other_peoples_packages(stdlib):
    for document in stdlib["train"] + stdlib["valid"]:
        parts = document.path.split("/")
        assert not {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"} & set(parts)
        assert not parts[0].startswith(("_sysconfigdata", "config-"))
        assert not document.path.startswith(("encodings/cp", "encodings/mac_", "encodings/koi8"))
        assert "codecs.charmap_build(decoding_table)" not in document.text


def test_stdlib_split_keeps_packages_whole(stdlib):
    tops = {split: {document.path.split("/")[0] for document in stdlib[split]} for split in stdlib}
    assert not tops["train"] & tops["valid"]
    # Both kinds are held out, and none of them dominates.
    sizes = {
        top: sum(len(d.text) for d in stdlib["valid"] if d.path.split("/")[0] == top) for top in tops["valid"]
    }
    assert sum(not top.endswith(".py") for top in sizes) >= 3
    assert sum(top.endswith(".py") for top in sizes) >= 3
    assert max(sizes.values()) < sum(sizes.values()) / 3


def test_stdlib_valid_share(stdlib):
    size = {split: sum(len(document.text.encode()) for document in stdlib[split]) for split in stdlib}
    assert 0.04 <= size["valid"] / sum(size.values()) <= 0.065


def test_stdlib_keeps_a_module_and_its_twin_together(tmp_path):
    twins = [("decimal", "_pydecimal"), ("io", "_pyio"), ("ntpath", "posixpath"), ("profile", "cProfile")]
    twins += [
        ("threading", "_threading_local"),
        ("datetime", "_strptime"),
        ("abc", "_py_abc"),
        ("wave", "aifc"),
    ]
    modules = [name for pair in twins for name in pair]
    for name in modules:
        (tmp_path / f"{name}.py").write_text("# text\n" * 10)
    # So large that the modules are 4 % of all and about half of them are held out.
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "__init__.py").write_text("# text\n" * 10 * 24 * len(modules))
    corpus = stdlib_corpus(tmp_path)
    side = {
        document.path.removesuffix(".py"): split
        for split in corpus.splits
        for document in corpus.splits[split]
    }
    assert [side[name] for name in modules].count("valid") == len(modules) // 2
    for one, other in twins:
        assert side[one] == side[other], (one, other)


def test_stdlib_holds_out_no_giant(tmp_path):
    for number in range(20):
        (tmp_path / f"giant{number}").mkdir()
        (tmp_path / f"giant{number}" / "__init__.py").write_text("# text\n" * 1000)
    for number in range(40):
        (tmp_path / f"small{number}.py").write_text("# text\n" * 20)
    valid = [document.path for document in stdlib_corpus(tmp_path).splits["valid"]]
    assert valid
    assert all(path.startswith("small") for path in valid)


def test_stdlib_skips_what_is_not_utf8_and_says_how_many(tmp_path, capsys):
    for number in range(60):
        (tmp_path / f"module{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "empty.py").write_text("\n")
    corpus = stdlib_corpus(tmp_path)
    paths = {document.path for split in corpus.splits.values() for document in split}
    assert paths == {f"module{number}.py" for number in range(60)}
    assert "skipped 1 files" in capsys.readouterr().err


def test_stdlib_without_source(tmp_path):
    with pytest.raises(InputError, match=r"no \*\.py"):
        stdlib_corpus(tmp_path)


def test_manifest_is_the_sorted_list_of_hashes():
    corpus = Corpus("c", {"train": [Document("b", "é"), Document("a", "x")], "valid": [Document("a", "y")]})
    rows = [
        f"train\ta\t{hashlib.sha256(b'x').hexdigest()}\n",
        f"train\tb\t{hashlib.sha256('é'.encode()).hexdigest()}\n",
        f"valid\ta\t{hashlib.sha256(b'y').hexdigest()}\n",
    ]
    assert corpus.manifest_sha256 == hashlib.sha256("".join(rows).encode()).hexdigest()


def _write_texts(directory: Path, texts: dict[str, str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_bytes(text.encode())
    return directory


def test_files_with_globs(tmp_path):
    _write_texts(
        tmp_path,
        {"a.txt": "one\r\ntwo", "b.txt": "zwei", "c.jsonl": '{"body": "x\\u2028y"}\n\n{"body": "z"}\n'},
    )
    _write_texts(tmp_path / "held" / "out", {"v.txt": "valid"})
    corpus = load_corpus(
        {
            "name": "files",
            "train": [f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"],
            "valid": f"{tmp_path}/held/**/*.txt",
            "text_key": "body",
        }
    )
    assert [(d.path, d.text) for d in corpus.splits["train"]] == [
        ("a.txt", "one\r\ntwo"),
        ("b.txt", "zwei"),
        ("c.jsonl:1", "x\u2028y"),
        ("c.jsonl:3", "z"),
    ]
    assert [(d.path, d.text) for d in corpus.splits["valid"]] == [("held/out/v.txt", "valid")]


def test_files_are_the_same_corpus_wherever_they_are(tmp_path, monkeypatch):
    hashes = set()
    for place in ("here", "there"):
        directory = _write_texts(tmp_path / place, {f"{i}.txt": f"text {i}" for i in range(100)})
        hashes.add(load_corpus({"name": "files", "train": f"{directory}/*.txt"}).manifest_sha256)
    monkeypatch.chdir(tmp_path / "here")
    hashes.add(load_corpus({"name": "files", "train": "*.txt"}).manifest_sha256)
    assert len(hashes) == 1
    (tmp_path / "here" / "7.txt").write_text("another text")
    assert load_corpus({"name": "files", "train": "*.txt"}).manifest_sha256 not in hashes


def test_held_out_fraction_follows_the_content(tmp_path):
    texts = {f"{i}.txt": f"text number {i}" for i in range(400)}
    directory = _write_texts(tmp_path, texts | {f"copy{name}": text for name, text in texts.items()})
    corpus = load_corpus({"name": "files", "train": f"{directory}/*.txt", "valid_fraction": 0.25})
    texts_of = {split: [d.text for d in corpus.splits[split]] for split in corpus.splits}
    assert not set(texts_of["train"]) & set(texts_of["valid"])
    assert sorted(texts_of["train"] + texts_of["valid"]) == sorted([*texts.values(), *texts.values()])
    # 400 draws at 0.25: five standard deviations are 43.
    assert abs(len(set(texts_of["valid"])) - 100) < 43


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("1" * 5000, "not JSON|expected a JSON object"),
        ('["text"]', "expected a JSON object"),
        ('{"txt": "a"}', "no key 'text'; it has txt"),
        ('{"text": 3}', "must be a string, found int"),
        ('{"text": "\\ud800"}', "unpaired surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, says):
    _write_texts(tmp_path, {"t.jsonl": f'{{"text": "fine"}}\n\n{line}\n', "v.txt": "v"})
    corpus = load_corpus({"name": "files", "train": f"{tmp_path}/*.jsonl", "valid": f"{tmp_path}/v.txt"})
    with pytest.raises(InputError, match=says) as error:
        _ = corpus.manifest_sha256
    assert f"{tmp_path}/t.jsonl, line 3" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"abc\xff")
    _write_texts(tmp_path, {"v.md": "v"})
    with pytest.raises(InputError, match=r"t\.txt: not UTF-8 \(byte 3: 0xff\)"):
        load_corpus({"name": "files", "train": f"{tmp_path}/*.txt", "valid": f"{tmp_path}/*.md"})


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        ({"name": "stlib"}, "data.name=stlib.*known: files, hf, stdlib"),
        ({}, "data.name=None"),
        ({"name": "files"}, "data.train is missing"),
        ({"name": "files", "train": "*.nothing"}, r"data.train=\*\.nothing: matches no file"),
        ({"name": "files", "train": "*.txt", "valid": "*.no"}, r"data.valid=\*\.no: matches no file"),
        (
            {"name": "files", "train": "*.txt", "valid": "a.txt"},
            r"a\.txt is .*a\.txt of data\.train; a held-out file is not trained on",
        ),
        ({"name": "files", "train": "*.txt", "valid_fraction": 1.5}, "data.valid_fraction=1.5"),
        ({"name": "files", "train": "*.txt", "valid_fraction": "most"}, "data.valid_fraction=most"),
        ({"name": "files", "train": "*.txt", "valid_fraction": 1e-9}, "valid split is empty"),
        ({"name": "files", "train": "*.txt", "valid_fraction": 1 - 1e-12}, "train split is empty"),
        ({"name": "files", "train": "blank.md", "valid": "a.txt"}, "train split is empty"),
        ({"name": "hf"}, "data.path is missing"),
    ],
)
def test_bad_configurations(tmp_path, monkeypatch, cfg, says):
    _write_texts(tmp_path, {"a.txt": "a", "b.txt": "b", "blank.md": " \n"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        load_corpus(cfg)


@pytest.fixture
def hub_directory(tmp_path, monkeypatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"content": f"row {i}", "n": i} for i in range(50)]
    return _write_texts(
        tmp_path / "set",
        {
            "train.jsonl": "".join(json.dumps(row) + "\n" for row in rows[:40]),
            "validation.jsonl": "".join(json.dumps(row) + "\n" for row in rows[40:]),
        },
    )


def test_hf_corpus_from_a_directory(hub_directory):
    cfg = {"name": "hf", "path": str(hub_directory), "valid_split": "validation", "text_key": "content"}
    corpus = load_corpus(cfg)
    assert [d.text for d in corpus.splits["train"]] == [f"row {i}" for i in range(40)]
    assert [d.text for d in corpus.splits["valid"]] == [f"row {i}" for i in range(40, 50)]
    held = load_corpus({**cfg, "valid_split": None, "valid_fraction": 0.5})
    texts = {split: {d.text for d in held.splits[split]} for split in held.splits}
    assert texts["train"] | texts["valid"] == {f"row {i}" for i in range(40)}
    assert not texts["train"] & texts["valid"]


def test_hf_corpus_errors(hub_directory):
    cfg = {"name": "hf", "path": str(hub_directory), "text_key": "content"}
    with pytest.raises(InputError, match="split holdout: cannot be loaded"):
        load_corpus({**cfg, "valid_split": "holdout"})
    with pytest.raises(InputError, match=r"data\.text_key=text: .* has no such column; it has content, n"):
        load_corpus({**cfg, "text_key": None})
    with pytest.raises(InputError, match="must be a string, found int"):
        load_corpus({**cfg, "text_key": "n"})
    with pytest.raises(InputError, match="cannot be loaded"):
        load_corpus({**cfg, "path": str(hub_directory / "absent")})


def test_a_data_set_of_the_hub_that_is_not_reached_is_named_with_its_download(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(path, *_, **__):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError, match="huggingface-cli download --repo-type dataset org/name --local-dir DIR"
    ):
        load_corpus({"name": "hf", "path": "org/name"})


def test_hf_corpus_skips_bad_rows(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": None if i % 4 == 1 else f"row {i}"} for i in range(40)]
    _write_texts(tmp_path / "set", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    cfg = {"name": "hf", "path": str(tmp_path / "set"), "valid_fraction": 0.5}
    corpus = load_corpus({**cfg, "bad_records": "skip"})
    kept = {d.text for split in corpus.splits.values() for d in split}
    assert kept == {f"row {i}" for i in range(40) if i % 4 != 1}
    assert "10 of 40 records skipped (train:1, 5, 9" in capsys.readouterr().err
    with pytest.raises(InputError, match="10 of 40 records cannot be used"):
        list(load_corpus(cfg).splits["train"])


def test_hf_corpus_runs_no_code_of_the_dataset(tmp_path):
    pytest.importorskip("datasets")
    ran = tmp_path / "ran"
    _write_texts(tmp_path / "evil", {"evil.py": f"open({str(ran)!r}, 'w')\n"})
    with pytest.raises(InputError):
        load_corpus({"name": "hf", "path": str(tmp_path / "evil"), "valid_fraction": 0.5})
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "key", "value", "owner"),
    [
        ("stdlib", "train", ["texts/*.txt"], "files"),
        ("stdlib", "path", "id", "hf"),
        ("files", "path", "id", "hf"),
    ],
)
def test_keys_of_another_corpus_do_not_go_unnoticed(name, key, value, owner):
    with pytest.raises(InputError, match=rf"data\.{key}=.*data={owner}.*data\.name={name}"):
        load_corpus({"name": name, key: value})
    assert load_corpus({"name": "stdlib", key: None}).splits


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("symlink", "is a link to the same file as"),
        ("link", "is a link to the same file as"),
        ("copy", "has the same content as"),
    ],
)
def test_a_held_out_file_that_is_a_training_file(tmp_path, how, says):
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    train.write_text("some text")
    (tmp_path / "other.txt").write_text("same size")
    {"symlink": valid.symlink_to, "link": valid.hardlink_to, "copy": lambda path: shutil.copy(path, valid)}[
        how
    ](train)
    with pytest.raises(InputError, match=rf"data\.valid: .*valid\.txt {says} .*train\.txt of data\.train"):
        load_corpus({"name": "files", "train": str(tmp_path / "*r*.txt"), "valid": str(valid)})
    valid.unlink()
    valid.write_text("SOME text")
    load_corpus({"name": "files", "train": str(tmp_path / "*r*.txt"), "valid": str(valid)})


@pytest.mark.parametrize(
    ("fraction", "went_to", "empty"), [(0.05, "train", "valid"), (1 - 1e-12, "valid", "train")]
)
def test_one_document_cannot_be_split(tmp_path, fraction, went_to, empty):
    """No fraction helps, and the line says what does."""
    _write_texts(tmp_path, {"only.txt": "all of it\n" * 100, "blank.txt": " \n"})
    with pytest.raises(InputError) as caught:
        load_corpus({"name": "files", "train": str(tmp_path / "*.txt"), "valid_fraction": fraction})
    assert f"the {empty} split is empty: all is one document, which went to the {went_to} split" in str(
        caught.value
    )
    assert "data.valid, or give a .jsonl file with one document a line" in str(caught.value)
    assert "larger" not in str(caught.value)
