"""The embedded default corpus: the source of Python's own standard library, real text on every machine."""

import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nemo_minitron.data.corpus import Corpus, Document, Stream
from nemo_minitron.errors import InputError

# Of all bytes, how many go to valid as whole packages and how many as single modules; none larger than the
# limit, so that the held-out split is many authors' code and no single giant.
_VALID_PACKAGE_SHARE = 0.03
_VALID_MODULE_SHARE = 0.02
_LARGEST_VALID_SHARE = 0.0125

# Characters of a line that two authors hardly write alike; shorter ones are the language's idioms.
_LONG_LINE = 40

_EXCLUDED_PARTS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "pydoc_data",
        "lib-dynload",
    }
)
_EXCLUDED_TOP = re.compile(r"_sysconfigdata|config-")
# Tables that a program wrote. The charmap codecs are also known by their table, whatever they are called.
_GENERATED_FILE = re.compile(r"encodings/(cp|iso8859|mac_|koi8|aliases)|re/_casefix\.py|stringprep\.py")
_CHARMAP_TABLE = re.compile(r"^decoding_(table|map)\s*=", re.MULTILINE)

# Modules that share text with another one go to the same side of the split as that one.
_SAME_SOURCE_AS = {
    "_aix_support": "distutils",
    "_bootsubprocess": "subprocess",
    "_collections_abc": "collections",
    "_compat_pickle": "pickle",
    "_compression": "gzip",
    "_markupbase": "html",
    "_osx_support": "distutils",
    "_py_abc": "abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_strptime": "datetime",
    "_threading_local": "threading",
    "_weakrefset": "weakref",
    "aifc": "wave",
    "asynchat": "asyncore",
    "bz2": "gzip",
    "cProfile": "profile",
    "genericpath": "posixpath",
    "imp": "importlib",
    "lzma": "gzip",
    "ntpath": "posixpath",
    "smtpd": "asyncore",
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "sunau": "wave",
    "sysconfig": "distutils",
    "token": "lib2to3",
    "tokenize": "lib2to3",
    "turtledemo": "turtle",
    "zipimport": "importlib",
}


def stdlib_corpus(root: Path | None = None) -> Corpus:
    """The `*.py` of a standard library, without tests and generated tables, split by whole packages.

    The sha256 of the top-level name decides the side (with limits on the shares, which come from sizes), so
    that the same Python version gives the same split everywhere. Held-out documents are without the long lines that
    the training split has too. `path` is relative to the library's directory.

    Args:
        root: the library's directory; the running interpreter's own by default.

    Raises:
        InputError: a directory without such files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    tops: dict[str, list[Path]] = {}
    sizes: dict[str, int] = {}
    for path in _source_files(root):
        group = top_level(path.relative_to(root).as_posix())
        tops.setdefault(group, []).append(path)
        sizes[group] = sizes.get(group, 0) + path.stat().st_size
    if not tops:
        raise InputError(
            f"data.name=stdlib: {root} holds no *.py of a standard library (a Python without its source?)"
        )
    packages = {
        group for group, paths in tops.items() if any(len(p.relative_to(root).parts) > 1 for p in paths)
    }
    valid = _valid_groups(sizes, packages)
    train_paths = sorted(path for group, paths in tops.items() if group not in valid for path in paths)
    valid_paths = sorted(path for group in valid for path in tops[group])
    train = Stream(partial(_read, root, train_paths))
    return Corpus(
        "stdlib", {"train": train, "valid": _without_copies(train, partial(_read, root, valid_paths))}
    )


def _without_copies(train: Stream, valid: Callable[[], Iterator[Document]]) -> Stream:
    """The held-out documents without the long lines that the training split has too.

    Licences, rulers and what was copied from module to module would be remembered, not predicted. The training split
    stays as it is, so that models trained on it do too.
    """

    @functools.cache
    def trained_on() -> frozenset[str]:
        return frozenset(key for d in train for line in d.text.split("\n") if (key := _long_line(line)))

    def read() -> Iterator[Document]:
        for document in valid():
            kept = (line for line in document.text.split("\n") if _long_line(line) not in trained_on())
            yield Document(document.path, "\n".join(kept))

    return Stream(read)


def _long_line(line: str) -> str | None:
    """By what a line is known: its words without white space and case; None of one that many would write alike."""
    key = " ".join(line.split()).casefold()
    return key if len(key) >= _LONG_LINE else None


def top_level(path: str) -> str:
    """The unit of the split: a path's top-level package or module, or the one that it shares text with."""
    name = path.split("/")[0].removesuffix(".py")
    return _SAME_SOURCE_AS.get(name, name)


def _valid_groups(sizes: dict[str, int], packages: set[str]) -> set[str]:
    total = sum(sizes.values())
    chosen: set[str] = set()
    for candidates, share in ((packages, _VALID_PACKAGE_SHARE), (set(sizes) - packages, _VALID_MODULE_SHARE)):
        taken = 0
        for group in sorted(candidates, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if sizes[group] <= _LARGEST_VALID_SHARE * total and taken < share * total:
                chosen.add(group)
                taken += sizes[group]
    return chosen


def _source_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(root):
        at_top = Path(directory) == root
        # In place, so that os.walk does not enter site-packages and its many thousand files.
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in _EXCLUDED_PARTS and not (at_top and _EXCLUDED_TOP.match(name))
        ]
        for name in files:
            path = Path(directory, name)
            generated = _GENERATED_FILE.match(path.relative_to(root).as_posix())
            if name.endswith(".py") and not generated and not (at_top and _EXCLUDED_TOP.match(name)):
                yield path


def _read(root: Path, paths: list[Path]) -> Iterator[Document]:
    undecodable = 0
    for path in paths:
        relative = path.relative_to(root).as_posix()
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
            continue
        if not (relative.startswith("encodings/") and _CHARMAP_TABLE.search(text)):
            yield Document(relative, text)
    if undecodable:
        print(f"stdlib: skipped {undecodable} files that are not UTF-8", file=sys.stderr)
