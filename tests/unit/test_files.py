"""Files that are opened: regular ones, not larger than what they are read for."""

import os
import socket
from pathlib import Path

import pytest

from nemo_minitron import files
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.data.corpora import files_corpus
from nemo_minitron.data.records import read_records
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.multiple_choice import load_task
from nemo_minitron.export.lineage import lineage
from nemo_minitron.importance.scores import Scores
from nemo_minitron.pruning import PrunePlan
from nemo_minitron.synthesis.prompts import read_prompts


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """What is no regular file; opening some of them as usual would wait for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    return {name: tmp_path / name for name in ("fifo", "directory", "zero", "loop", "socket")}


def test_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("é\u2028\r\nb".encode())
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert files.read_text(tmp_path / name) == "é\u2028\r\nb"
        assert list(files.lines(tmp_path / name)) == ["é\u2028\r\n".encode(), b"b"]
        files.check_regular(tmp_path / name, 8)


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(6 << 30)
    (tmp_path / "lines").write_bytes(b"ab\nabcd\n")
    assert list(files.lines(tmp_path / "lines", 5)) == [b"ab\n", b"abcd\n"]
    with pytest.raises(OSError, match="line 2 has more than 4 bytes"):
        list(files.lines(tmp_path / "lines", 4))
    with pytest.raises(OSError, match="at most 67,108,864 are read"):
        files.read_bytes(tmp_path / "sparse")
    with pytest.raises(OSError, match="line 1 has more than"):
        next(files.lines(tmp_path / "sparse", 1 << 20))


def test_what_is_no_regular_file_is_not_opened(odd: dict[str, Path]) -> None:
    for name, path in odd.items():
        with pytest.raises(OSError):
            files.open_regular(path)
        for read in (
            lambda p: list(read_records(p)),
            lambda p: load_task(p, None, 8),
            lambda p: read_prompts(str(p), "prompt", None),
            Scores.load,
            PrunePlan.load,
        ):
            with pytest.raises(InputError) as caught:
                read(path)  # type: ignore[no-untyped-call]
            assert name in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_of_pipes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_document_that_is_too_large_is_named(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(files.LONGEST_LINE + 1)
    (tmp_path / "b.txt").write_text("held out")
    corpus = files_corpus({"train": f"{tmp_path}/a.txt", "valid": f"{tmp_path}/b.txt"})
    with pytest.raises(InputError, match=r"a.txt: cannot be read .*one document a line"):
        list(corpus.splits["train"])


def test_what_keeps_a_directory_from_being_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert files.obstacle(tmp_path / "a" / "b") is None
    assert files.obstacle(tmp_path / "file" / "b") == tmp_path / "file"
    assert files.obstacle(Path("/dev/null/b")) == Path("/dev/null")


def test_a_path_that_a_user_types_may_be_none_at_all(tmp_path: Path) -> None:
    """A user who is not there, and a link to itself: `pathlib` raises a RuntimeError at both."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert files.user_path("~") == Path.home()
    assert files.real(tmp_path / "a" / ".." / "b") == tmp_path.resolve() / "b"
    for path in ("~nobody-of-that-name/x", str(loop)):
        assert lineage(path).legal == ()
        with pytest.raises(InputError, match=f"source={path}: no such"):
            find_source(path)


def test_what_a_library_says_of_a_file_is_one_line(tmp_path: Path) -> None:
    """safetensors repeats the name of a type that it does not know."""
    header = b'{"a": {"dtype": "F\\n32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "scores").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(InputError, match="not a scores file") as caught:
        Scores.load(tmp_path / "scores")
    assert len(str(caught.value).splitlines()) == 1
