"""Corpora: named sets of documents with a train and a valid split, and a hash that names their content."""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.data.bad_records import REFUSE, BadRecords, each_file
from nemo_minitron.data.corpus import SPLITS, Corpus, Document, Stream
from nemo_minitron.data.held_out import refuse_shared
from nemo_minitron.data.records import Record, kind_of, read_document, read_records
from nemo_minitron.data.stdlib import stdlib_corpus
from nemo_minitron.errors import InputError, first_line

DEFAULT_VALID_FRACTION = 0.05


def load_corpus(cfg: Mapping[str, Any]) -> Corpus:
    """Open the corpus that a configuration names. Documents are read when they are walked, not here.

    Args:
        cfg: `name` and the keys of that corpus; those of other corpora must be absent or null.
            stdlib: none.
            files: `train` and optionally `valid` (a glob or a list of globs, `**` allowed; a file of records
            (`data.records`) has one document a record, any other file is one document), `text_key` ("text"),
            `valid_fraction` (0.05; held out by content hash where `valid` is not given), `bad_records` ("refuse").
            hf: `path` (a `datasets` id or directory), `config`, `revision`, `train_split` ("train"),
            `valid_split` (null: hold out `valid_fraction`), `text_key`.

    Raises:
        InputError: an unknown name, a missing key or another corpus's, a glob that matches nothing, an empty split;
            and, while documents are walked, as `read_records`, `read_document` and `BadRecords`.
    """
    openers: dict[str, Callable[[Mapping[str, Any]], Corpus]] = {
        "stdlib": lambda _: stdlib_corpus(),
        "files": files_corpus,
        "hf": hf_corpus,
    }
    name = cfg.get("name")
    if name not in openers:
        raise InputError(f"data.name={name}: no such corpus; known: {', '.join(sorted(openers))}")
    check_keys(str(name), cfg)
    corpus = openers[str(name)](cfg)
    for split in SPLITS:
        if next(iter(corpus.splits[split]), None) is None:
            raise InputError(f"data.name={name}: the {split} split is empty{_hint(split, corpus, cfg)}")
    return corpus


def _hint(split: str, corpus: Corpus, cfg: Mapping[str, Any]) -> str:
    """What helps against an empty split; no fraction does where all is one document."""
    if cfg.get("valid") is not None or cfg.get("valid_split") is not None:
        return _EMPTY_HINT[split]
    there = [document for of in SPLITS for document in itertools.islice(iter(corpus.splits[of]), 2)]
    if len(there) == 1:
        other = next(of for of in SPLITS if of != split)
        return (
            f": all is one document, which went to the {other} split as a whole; name held-out documents in "
            "data.valid, or give a .jsonl file with one document a line"
        )
    return _EMPTY_HINT[split]


_KEYS = {
    "stdlib": (),
    "files": ("train", "valid", "text_key", "valid_fraction"),
    "hf": ("path", "config", "revision", "train_split", "valid_split", "text_key", "valid_fraction"),
    "blend": ("blend",),
}


def check_keys(name: str, cfg: Mapping[str, Any]) -> None:
    """Refuse what belongs to another corpus: files that were named but not read would go unnoticed.

    Raises:
        InputError: names the key and the corpus; or no such corpus.
    """
    if name not in _KEYS:
        raise InputError(f"data.name={name}: no such corpus; known: {', '.join(sorted(_KEYS))}")
    for owner, keys in _KEYS.items():
        for key in keys:
            if cfg.get(key) is not None and key not in _KEYS[name]:
                raise InputError(
                    f"data.{key}={cfg[key]}: is of data={owner}, but data.name={name} was chosen"
                )


_EMPTY_HINT = {
    "train": "; it needs at least one document with text",
    "valid": "; give held-out documents (data.valid, data.valid_split) or a larger data.valid_fraction",
}


def held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the valid split: by its content, so that copies stay on one side."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _with_hold_out(name: str, cfg: Mapping[str, Any], everything: Stream) -> Corpus:
    fraction = cfg.get("valid_fraction")
    fraction = DEFAULT_VALID_FRACTION if fraction is None else fraction
    if not isinstance(fraction, float) or not 0.0 < fraction < 1.0:
        raise InputError(f"data.valid_fraction={fraction}: must be above 0 and below 1")
    return Corpus(
        name,
        {
            "train": Stream(lambda: (d for d in everything if not held_out(d, fraction))),
            "valid": Stream(lambda: (d for d in everything if held_out(d, fraction))),
        },
    )


def files_corpus(cfg: Mapping[str, Any]) -> Corpus:
    """Text files and files of records by glob; see `load_corpus` for the keys.

    Raises:
        InputError: no `train`, or a glob that matches no file.
    """
    text_key = cfg.get("text_key") or "text"
    train, valid = files_of(cfg)
    # Ids are relative to what the files have in common: the same files elsewhere are the same corpus.
    root = os.path.commonpath([os.path.dirname(path) for path in [*train, *valid]])
    choice, told, where = cfg.get("bad_records") or REFUSE, set[str](), cfg.get("where", "data")

    def stream(key: str, files: list[str]) -> Stream:
        return Stream(lambda: _read_files(files, root, text_key, BadRecords(choice, key, told)))

    if not valid:
        return _with_hold_out("files", cfg, stream(f"{where}.train", train))
    return Corpus(
        "files", {"train": stream(f"{where}.train", train), "valid": stream(f"{where}.valid", valid)}
    )


def files_of(cfg: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The training and the held-out files of `files_corpus`, absolute; none of another corpus.

    Raises:
        InputError: as `files_corpus`; a held-out file that is a training file.
    """
    if cfg.get("name") not in (None, "files"):
        return [], []
    if not cfg.get("train"):
        raise InputError(
            "data.train is missing: data.name=files needs a glob or a list of globs of text, .jsonl, .json or .parquet "
            "files"
        )
    train = _matches(cfg["train"], "data.train")
    valid = _matches(cfg["valid"], "data.valid") if cfg.get("valid") else []
    refuse_shared(train, valid, "data.train", "data.valid")
    return train, valid


def _matches(patterns: str | Iterable[str], key: str) -> list[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [os.path.abspath(path) for path in matches if os.path.isfile(path)]
        if not files:
            raise InputError(f"{key}={pattern}: matches no file; give a glob such as 'texts/**/*.txt'")
        found.update(files)
    return sorted(found)


def _read_files(paths: list[str], root: str, text_key: str, bad: BadRecords) -> Iterator[Document]:
    def read(path: str, bad: BadRecords) -> Iterator[Document]:
        name = os.path.relpath(path, root)
        if kind_of(path) == "text":
            return bad.good(_whole(path), lambda record: Document(name, record.value["text"]))
        records = read_records(path, (text_key,))
        return bad.good(
            records, lambda r: Document(f"{name}:{r.number}", _text_of(r.value, text_key, r.where))
        )

    return each_file(paths, read, bad)


def _whole(path: str) -> Iterator[Record]:
    """A text file as one record."""
    value: Any
    try:
        value = {"text": read_document(path)}
    except InputError as error:
        value = error
    yield Record(value, path, 1, path)


def jsonl_documents(path: str | Path, text_key: str = "text") -> Stream:
    """All documents of one JSONL file, one a line."""
    directory, what = os.path.dirname(path), str(path)
    return Stream(lambda: _read_files([what], directory or ".", text_key, BadRecords(REFUSE, what)))


def _text_of(row: Any, text_key: str, where: str) -> str:
    if text_key not in row:
        raise InputError(
            f"{where}: no key '{text_key}'; it has {', '.join(map(str, itertools.islice(row, 8)))}"
        )
    text = row[text_key]
    if not isinstance(text, str):
        raise InputError(f"{where}: '{text_key}' must be a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
        raise InputError(
            f"{where}: '{text_key}' holds an unpaired surrogate escape, which is no Unicode text"
        ) from None
    return text


def hf_corpus(cfg: Mapping[str, Any]) -> Corpus:
    """A dataset of the Hugging Face `datasets` library, memory-mapped, without remote code.

    See `load_corpus` for the keys.

    Raises:
        InputError: no `path`, a dataset or split that cannot be loaded, or no such text column.
    """
    path = cfg.get("path")
    if not path:
        raise InputError(
            "data.path is missing: data.name=hf needs a `datasets` id or a directory of data files"
        )
    text_key = cfg.get("text_key") or "text"
    train_split = cfg.get("train_split") or "train"
    if cfg.get("valid_split") == train_split:
        raise InputError(
            f"data.valid_split={train_split}: is data.train_split; a held-out split is not trained on"
        )
    train = _hf_split(cfg, str(path), train_split, text_key)
    if not cfg.get("valid_split"):
        return _with_hold_out("hf", cfg, train)
    return Corpus(
        "hf", {"train": train, "valid": _hf_split(cfg, str(path), str(cfg["valid_split"]), text_key)}
    )


def _download(path: str) -> str:
    """What to do where the hub is not reached, if a path can be an id of the hub."""
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return ""
    return (
        f"; where the hub is reachable, `huggingface-cli download --repo-type dataset {path} --local-dir DIR`, then "
        "data.path=DIR, or data=files data.train=DIR/**/*.parquet"
    )


def _hf_split(cfg: Mapping[str, Any], path: str, split: str, text_key: str) -> Stream:
    import datasets

    try:
        rows = datasets.load_dataset(
            path, cfg.get("config"), split=split, revision=cfg.get("revision"), trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data.path={path}, split {split}: cannot be loaded ({first_line(error)}){_download(path)}"
        ) from error
    if text_key not in rows.column_names:
        raise InputError(
            f"data.text_key={text_key}: {path} has no such column; it has {', '.join(rows.column_names)}"
        )

    def read() -> Iterator[Document]:
        bad = BadRecords(cfg.get("bad_records") or REFUSE, f"data.path={path}", told)
        found = (
            Record(row, f"{path}, {split} row {number}", number, f"{split}:{number}")
            for number, row in enumerate(rows.select_columns([text_key]))
        )
        yield from bad.good(found, lambda r: Document(r.place, _text_of(r.value, text_key, r.where)))
        bad.finish()

    told = set[str]()
    return Stream(read)
