"""Files of records: every form of a file gives what json, pyarrow and the compressors' own modules say is in it."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from nemo_minitron.data import compressed, json_stream
from nemo_minitron.data.bad_records import BadRecords, each_file
from nemo_minitron.data.chat.conversations import read_conversations, read_preferences
from nemo_minitron.data.chat.formats import convert_file
from nemo_minitron.data.corpora import load_corpus
from nemo_minitron.data.records import read_records
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.multiple_choice import load_task
from nemo_minitron.synthesis.prompts import read_prompts

ROWS: list[dict[str, Any]] = [
    {"text": "one\u2028[{", "n": 1},
    {"text": 'zwei "ä" \\ }', "n": None},
    {"text": "３\U0001f600" * 400, "n": 3},
]
LINES = "".join(
    json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(ROWS)
).encode()
BOM = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


FORMS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_bytes(LINES),
    "A.JSONL": lambda p: p.write_bytes(LINES),
    "a.ndjson": lambda p: p.write_bytes(LINES),
    "bom.jsonl": lambda p: p.write_bytes(BOM + LINES),
    "crlf.jsonl": lambda p: p.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "no-end.jsonl": lambda p: p.write_bytes(LINES.rstrip()),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES[:9]) + gzip.compress(LINES[9:])),
    "a.JSONL.GZ": lambda p: p.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": lambda p: p.write_bytes(zstd(LINES[:9]) + zstd(LINES[9:])),
    "a.ndjson.zstd": lambda p: p.write_bytes(zstd(BOM + LINES)),
    "a.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES)),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES)),
    "unpacked.jsonl.gz": lambda p: p.write_bytes(LINES),
    "packed.jsonl": lambda p: p.write_bytes(gzip.compress(LINES)),
    "lines.json": lambda p: p.write_bytes(LINES),
    "bom-lines.json": lambda p: p.write_bytes(BOM + b"\n" + LINES),
    "lines.json.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "array.json": lambda p: p.write_text(json.dumps(ROWS)),
    "pretty.json": lambda p: p.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "bom-array.json": lambda p: p.write_bytes(BOM + b" \r\n" + json.dumps(ROWS, indent=1).encode()),
    "array.json.zst": lambda p: p.write_bytes(zstd(json.dumps(ROWS).encode())),
    "a.parquet": lambda p: parquet.write_table(pyarrow.Table.from_pylist(ROWS), p),
    "A.Parquet": lambda p: parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), p, compression="zstd", row_group_size=2
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_every_form_of_a_file_has_the_same_records(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    FORMS[name](tmp_path / name)
    records = list(read_records(tmp_path / name))
    assert [record.value for record in records] == ROWS
    assert len({record.where for record in records}) == len(ROWS)
    (tmp_path / "v.txt").write_text("held out")
    corpus = load_corpus({"name": "files", "train": f"{tmp_path}/{name}", "valid": f"{tmp_path}/v.txt"})
    assert [document.text for document in corpus.splits["train"]] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json", "parquet"])
def test_all_that_reads_records_reads_every_form(suffix: str, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    conversation = {"messages": talk, "id": 7}
    pair = {"messages": talk[:1], "chosen": "yes", "rejected": "no"}
    question = {"question": "1 + 1 =", "choices": ["2", "3"], "answer": "2"}
    prompt = {"prompt": "Once"}

    def file(name: str, row: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        elif suffix == "json":
            path.write_text(json.dumps([row, row]))
        else:
            path.write_bytes(gzip.compress(f"{json.dumps(row)}\n{json.dumps(row)}\n".encode()))
        return path

    for samples in (
        read_conversations(file("talk", conversation)),
        list(convert_file(file("talk", conversation))),
    ):
        assert [(sample.messages, sample.extra) for sample in samples] == [(talk, {"id": 7})] * 2
    pairs = list(read_preferences(file("pairs", pair)))
    assert [(p.messages, p.chosen, p.rejected) for p in pairs] == [(talk[:1], "yes", "no")] * 2
    task = load_task(file("task", question), Characters(), 99)
    assert (task.answers, task.choices) == ([0, 0], [2, 2])
    assert (
        read_prompts(str(file("prompts", prompt)), "prompt", Characters(), bos=False).tokens
        == [  # type: ignore[arg-type]
            [0, *map(ord, "Once")]
        ]
        * 2
    )


class Characters:
    """A tokenizer whose ids are code points."""

    eos_token_id = 0

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(map(ord, text))


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "cut.json": (json.dumps(ROWS).encode()[:-3], "line 1, item 3: not JSON"),
    "open.json": (json.dumps(ROWS).encode()[:-1], "line 1: not JSON (the array has no end)"),
    "more.json": (json.dumps(ROWS, indent=1).encode() + b"\n[]", "line 15: not JSON (text after the array)"),
    "comma.json": (b'[\n{"text": "a"},\n]', "line 3, item 2: not JSON"),
    "no-comma.json": (b'[{"text": "a"}\n{"text": "b"}]', "line 2: not JSON ('{' where , or ] belongs)"),
    "latin.json": (b'[{"text": "\xe9"}]', "not UTF-8"),
    "deep.json": (b"[" * 200_000, "line 1, item 1: not JSON"),
    "numbers.json": (b"[1, 2, 3]", "line 1, item 1: expected a JSON object, found int"),
    "array.jsonl": (b'[{"text": "a"}]', "found list; an array of them is read from a file named .json"),
    "wrapped.json": (b'{\n"data": [{"text": "a"}]\n}', "line 1: no key 'text'; it has data"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "not UTF-8 (byte 0: 0xff); it begins as UTF-16 does"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], "compressed data is damaged or cut short"),
    "cut.jsonl.zst": (zstd(LINES)[:-20], "compressed data is damaged or cut short"),
    "no.parquet": (LINES, "cannot be read as Parquet"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "records.txt": (LINES, "holds JSON, and would be read as text; name it .jsonl or .json"),
    "array.txt": (json.dumps(ROWS, indent=1).encode(), "holds JSON, and would be read as text"),
    "table.csv": (b"text\na\n", ".csv files are not read; must be text, or .json, .jsonl"),
    "texts.tar.gz": (gzip.compress(b"a"), ".tar files are not read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, says = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "v.md").write_text("held out")
    with pytest.raises(InputError) as caught:
        _ = load_corpus(
            {"name": "files", "train": f"{tmp_path}/{name}", "valid": f"{tmp_path}/v.md"}
        ).manifest_sha256
    assert says in str(caught.value)
    assert f"{tmp_path}/{name}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_text_is_read_without_its_mark_and_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + b"a\r\n{b}")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"[1] is a footnote"))
    (tmp_path / "v.md").write_text("held out")
    corpus = load_corpus({"name": "files", "train": f"{tmp_path}/*.t*", "valid": f"{tmp_path}/v.md"})
    assert [d.text for d in corpus.splits["train"]] == ["a\r\n{b}", "[1] is a footnote"]


def test_a_small_file_that_unpacks_to_very_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "_ALWAYS_READ", 1 << 16)
    lines = b'{"text": "a"}\n' * 100_000
    for name, data in {"a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstd(lines)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=r"cannot be read \(more than [\d,]+ bytes when decompressed"):
            list(read_records(tmp_path / name))


def _with_bad_lines(directory: Path) -> Path:
    """1,000 good lines and 14 of six kinds of bad ones, among them."""
    bad = ["{", "\x00", "[]", '{"txt": ""}', '{"text": null}', '{"text": 3}', '{"text": "\\ud800"}'] * 2
    lines = [json.dumps({"text": f"text {number}"}) for number in range(1000)]
    for number, line in enumerate(bad):
        lines.insert(50 * (number + 1) - 1, line)
    (directory / "t.jsonl").write_text("\n".join(lines))
    (directory / "v.txt").write_text("held out")
    return directory / "t.jsonl"


def test_bad_records_are_refused_together(tmp_path: Path) -> None:
    path = _with_bad_lines(tmp_path)
    corpus = load_corpus({"name": "files", "train": str(path), "valid": f"{tmp_path}/v.txt"})
    with pytest.raises(InputError) as caught:
        list(corpus.splits["train"])
    message = str(caught.value)
    assert message.startswith(f"{path}, line 50: not JSON")
    places = f"{path}:50, 100, 150, 200, 250, 300, 350, 400, 450, 500 and 4 more"
    assert f"14 of 1,014 records cannot be used ({places})" in message
    assert message.endswith("mend them, or leave them out with data.bad_records=skip")


def test_bad_records_are_skipped_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _with_bad_lines(tmp_path)
    cfg = {"name": "files", "train": str(path), "valid": f"{tmp_path}/v.txt", "bad_records": "skip"}
    corpus = load_corpus(cfg)
    for _ in range(2):
        assert [d.text for d in corpus.splits["train"]] == [f"text {number}" for number in range(1000)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.train: 14 of 1,014 records skipped ({path}:50, 100, 150, ")
    assert "500 and 4 more); the first: " in line


@pytest.mark.parametrize("choice", ["refuse", "skip"])
def test_files_of_nothing_but_bad_records_are_refused_early(choice: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "a"}\n' * 5000)
    bad = BadRecords(choice, "data.train")

    def refuse(record: Any) -> None:
        raise InputError(f"{record.where}: no")

    with pytest.raises(InputError, match=r"line 1: no; the first 1,000 records are all like this"):
        list(bad.good(read_records(path), refuse))
    assert bad.read == 1000


def test_conversations_and_pairs_are_skipped_over_all_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    bad_talk = [talk[::-1], [talk[0], *talk], [talk[0], {"role": "assistant", "content": None}], []]
    for name in ("a", "b"):
        rows = [{"messages": messages} for messages in (talk, *bad_talk, talk)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    read = lambda file, bad: convert_file(file, bad=bad)  # noqa: E731
    samples = list(each_file(files, read, BadRecords("skip", "align.train")))
    assert [sample.messages for sample in samples] == [talk] * 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"align.train: 8 of 12 records skipped ({files[0]}:2, 3, 4, 5, {files[1]}:2, 3, 4, 5); the first: "
    )
    with pytest.raises(InputError, match="8 of 12 records cannot be used"):
        list(each_file(files, read, BadRecords("refuse", "align.train")))
