"""A corpus: documents in a train and a valid split, and a hash that names their content."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Document:
    """One text. `path` is a stable id (no machine-specific part where the corpus has a choice)."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A corpus.

    Args:
        name: what the configuration calls it.
        splits: "train" and "valid", each an iterable of documents that can be walked more than once (a list,
            or an object that streams from disk); no document is empty.
    """

    name: str
    splits: Mapping[str, Iterable[Document]]

    @cached_property
    def manifest_sha256(self) -> str:
        """Hex sha256 over the sorted (split, path, sha256 of the UTF-8 bytes) of all documents.

        Reads the corpus once, and holds its paths in memory but not its texts.
        """
        rows = [
            f"{split}\t{document.path}\t{hashlib.sha256(document.text.encode()).hexdigest()}\n"
            for split in SPLITS
            for document in self.splits[split]
        ]
        return hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()


class Stream:
    """Documents from a function that opens them anew for each walk; those without text are passed over."""

    def __init__(self, source: Callable[[], Iterator[Document]]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self._source() if document.text.strip())
