"""docker's words as buildah's, in chroot isolation: a machine without an engine can build and run an image."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

BUILD_S = 1800
# docker's options by who takes them here; buildah has no process to reap zombies and removes nothing by itself. Chroot
# leaves the network and /dev/shm as they are.
_OF_RUN = {"--user": "--user", "--env": "--env", "--volume": "--volume", "--workdir": "--workingdir"}
_OF_CONTAINER, _LEFT_OUT = ("--shm-size", "--ulimit", "--network"), ("--rm", "--init")


class Buildah:
    """buildah with its storage, state and temporary files in a directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        places = {"--root": home / "storage", "--runroot": home / "state"}
        self.command = ["buildah", *(str(x) for pair in places.items() for x in pair), "--storage-driver=vfs"]
        (home / "tmp").mkdir()

    def ended(self, *arguments: str, limit: float = BUILD_S) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.home / "tmp")}
        return subprocess.run(
            [*self.command, *arguments], env=env, capture_output=True, text=True, timeout=limit, cwd=self.home
        )

    def __call__(self, *arguments: str) -> str:
        done = self.ended(*arguments)
        assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()


def options(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """docker run's options up to the image, each with its value."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            return
        name, equals, value = word.partition("=")
        yield name, value if equals else None if name in _LEFT_OUT else next(rest)


def allowed(limit: str) -> bool:
    """Whether this machine lets root set `memlock=-1`: Docker's daemon may raise limits that a container may not."""
    name, _, value = limit.partition("=")
    ask = f"import resource as r; r.setrlimit(r.RLIMIT_{name.upper()}, ({value}, {value}))"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode == 0


def translated(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """`docker run` as options of `buildah from`, options of `buildah run`, and what neither takes here."""
    assert words[:2] == ["docker", "run"], words
    made, given, left = [], [], []
    for name, value in options(words[2:]):
        if name in _OF_RUN:
            given.append(f"{_OF_RUN[name]}={value}")
        elif name in _OF_CONTAINER and (name != "--ulimit" or allowed(str(value))):
            made.append(f"{name}={value}")
        else:
            assert name in (*_LEFT_OUT, "--ulimit"), f"{name}: buildah's word for it is not known"
            left.append(f"{name}={value}" if value else name)
    return made, given, left
