"""Temporary directories: whose they are, and that those of the dead go."""

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_minitron import scratch
from nemo_minitron.files import replacing, write_text

MAKES = "import sys, time\nfrom nemo_minitron import scratch\nprint(scratch.{}, flush=True)\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's place for temporary directories, also of processes started from here."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def started(code: str) -> "subprocess.Popen[str]":
    """A process that makes a directory and waits; its first line names it."""
    return subprocess.Popen(
        [sys.executable, "-c", MAKES.format(code) + "time.sleep(60)"], stdout=-1, text=True
    )


def test_what_sigkill_left_goes_with_the_next_one_and_what_is_in_use_stays(place: Path) -> None:
    dead, alive, other = (started(f"lasting('{kind}')") for kind in ("a", "a", "b"))
    made = [Path(p.stdout.readline().strip()) for p in (dead, alive, other) if p.stdout]
    for directory in made:
        (directory / "file").touch()
    for process in (dead, other):
        process.kill()
        process.wait()
    with scratch.directory("a") as mine:
        there = set(place.iterdir())
    alive.kill()
    alive.wait()
    assert there == {mine, made[1], made[2]}
    assert not mine.exists()
    assert made[1].joinpath("file").exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_was_half_made_goes_when_it_is_made_again(place: Path, kind: str) -> None:
    """A converted checkpoint, say: another process that makes the same at the moment is left alone."""
    making = (
        "import sys, time\nfrom pathlib import Path\nfrom nemo_minitron.files import replacing\n"
        f"with replacing(Path('{place}/final')) as new:\n"
        f"    {'new.mkdir()' if kind == 'directory' else 'pass'}\n"
        f"    {'(new / chr(120))' if kind == 'directory' else 'new'}.write_text('x')\n"
        "    print(new, flush=True)\n    time.sleep(60)\n"
    )
    dead, alive = (subprocess.Popen([sys.executable, "-c", making], stdout=-1, text=True) for _ in range(2))
    half = [Path(p.stdout.readline().strip()) for p in (dead, alive) if p.stdout]
    assert [path.exists() for path in half] == [True, True]
    dead.kill()
    dead.wait()
    with replacing(place / "final") as new:
        new.write_text("whole")
    there = set(place.iterdir())
    alive.kill()
    alive.wait()
    assert there == {place / "final", half[1].parent}
    assert (place / "final").read_text() == "whole"
    write_text(place / "final", "again")
    assert set(place.iterdir()) == {place / "final"}


def test_many_at_once_lose_nothing(place: Path) -> None:
    """Each looks for what others left while those make theirs."""
    code = MAKES.format("__name__") + (
        "for _ in range(300):\n    with scratch.directory('a') as mine:\n        (mine / 'x').write_text('x')\n"
        "        assert (mine / 'x').read_text() == 'x'\n"
    )
    several = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait(timeout=100) for process in several] == list(itertools.repeat(0, 4))
    assert list(place.iterdir()) == []


def test_a_fork_holds_no_directory_back_and_removes_none(place: Path) -> None:
    """What a child that was forked exits with is its own affair."""
    code = "import os\nmine = scratch.lasting('a')\nif not os.fork():\n    sys.exit()\nos.wait()\nprint(mine.exists())"
    done = subprocess.run(
        [sys.executable, "-c", MAKES.format("__name__") + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1] == "True"
    assert list(place.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_user_s_stays(place: Path) -> None:
    with scratch.directory("a") as mine:
        foreign = place / f"{mine.name.rpartition('-')[0]}-foreign"
        link = place / f"{mine.name.rpartition('-')[0]}-link"
    foreign.mkdir()
    os.chown(foreign, 12345, 12345)
    link.symlink_to(place)
    with scratch.directory("a") as mine:
        assert set(place.iterdir()) == {mine, foreign, link}
