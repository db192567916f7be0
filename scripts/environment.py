"""Makes the Python environment that the project's commands run in, and prints its interpreter.

It lives outside the clone, in a directory named by a hash of what was asked for (the pins, the dependency
lists, the Python, the flavour of torch), so that every clone with the same pins shares it and a second set-up
only looks it up. The package itself is not installed there: commands take it from the clone they start in.

Only the standard library is used, because this runs before anything is installed. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = 1  # raise it when what this script installs changes for the same pins
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "complete.json"
HASHES = ROOT / "supply_chain" / "hashes.txt"  # of the pinned files; scripts/supply_chain.py makes it
# nvidia-* packages that hold no CUDA libraries; anything else of that name is hundreds of MB.
SMALL_NVIDIA = {"nvidia-ml-py", "nvidia-modelopt", "nvidia-resiliency-ext"}
CUDA_PACKAGE = re.compile(r"nvidia-.+|cuda-.+|cupy.*|triton|pytorch-triton.*|transformer-engine.*")


class SetupError(Exception):
    """The set-up cannot go on; the message is for the user."""


def say(message: str) -> None:
    """Prints progress where it does not mix with the interpreter's path."""
    print(message, file=sys.stderr, flush=True)


def requirements(extras: list[str]) -> list[str]:
    """The requirement lines of pyproject.toml, with those of the named extras.

    Raises:
        SetupError: an extra does not exist.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            raise SetupError(
                f"EXTRAS: no extra {extra!r}; there are {', '.join(project['optional-dependencies'])}"
            )
        lines += project["optional-dependencies"][extra]
    return lines


def has_cuda() -> bool:
    """Whether this machine has an NVIDIA GPU that a driver shows."""
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def home() -> Path:
    """Where environments live: NEMO_MINITRON_HOME, else the user's cache directory."""
    if own := os.environ.get("NEMO_MINITRON_HOME"):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache").absolute() / "nemo_minitron"


class Environment:
    """One environment: what is asked of it, where it lies, and how it is made."""

    def __init__(self, torch: str, torch_index: str, extras: list[str]) -> None:
        self.flavour = ("cuda" if has_cuda() else "cpu") if torch == "auto" else torch
        self.torch_index = torch_index
        self.requirements = requirements(extras)
        self.constraints = ROOT / "constraints.txt"
        asked = {
            "layout": LAYOUT,
            "constraints": self.constraints.read_text(),
            "requirements": self.requirements,
            "python": [*sys.version_info[:2], platform.python_implementation()],
            "platform": [sys.platform, platform.machine()],
            "torch": [self.flavour, torch_index],
        }
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        self.path = home() / "envs" / key
        self.python = self.path / "bin" / "python"
        self.log = self.path / "setup.log"

    def ready(self) -> bool:
        """Whether a set-up ended here and its interpreter still runs (its base Python may be gone)."""
        if not (self.path / STAMP).is_file():
            return False
        try:
            return subprocess.run([str(self.python), "-I", "-c", ""], capture_output=True).returncode == 0
        except OSError:
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Holds the environment's lock; two set-ups of one environment wait for each other.

        The kernel drops the lock with its last holder. pip inherits it, so a pip that outlives a killed
        set-up still holds it, and the next set-up does not delete the directory under it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.path}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another set-up of this environment is running: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.fileno()

    def found(self) -> Path | None:
        """The interpreter, if the environment is ready; else that of the newest one this clone made otherwise."""
        if self.ready():
            return self.python
        stamps = sorted(self.path.parent.glob(f"*/{STAMP}"), key=lambda stamp: stamp.stat().st_mtime)
        for stamp in reversed(stamps):
            if json.loads(stamp.read_text()).get("made_by") == str(ROOT):
                return stamp.parent / "bin" / "python"
        return None

    def make(self) -> None:
        """Makes the environment unless it is there.

        Raises:
            SetupError: something is missing on this machine, or pip failed.
        """
        if self.ready():
            return
        with self.locked() as lock:
            if self.ready():
                return
            if self.path.exists():
                say(f"{self.path}: left unfinished or broken by an earlier set-up, made anew")
                shutil.rmtree(self.path)
            start = time.monotonic()
            say(f"setting up {self.path} (Python {platform.python_version()}, torch for {self.flavour})")
            self._build(lock)
            stamp = {"made_by": str(ROOT), "python": platform.python_version(), "torch": self.flavour}
            partial = self.path / (STAMP + ".partial")
            partial.write_text(json.dumps(stamp))
            partial.rename(self.path / STAMP)
            say(f"set-up done in {time.monotonic() - start:.0f} s")

    def _build(self, lock: int) -> None:
        require_build_tools()
        self.path.mkdir()
        self._run("[1/5] virtual environment", [sys.executable, "-m", "venv", str(self.path)], lock)
        self._update_pip(lock)
        self._install_torch(lock)
        wanted = self.path / "requirements.in"
        wanted.write_text("".join(f"{line}\n" for line in self.requirements))
        report = self.path / "resolution.json"
        files = ["--report", str(report), "-c", str(self.constraints), "-r", str(wanted)]
        resolve = ["install", "--dry-run", *files]
        self._pip("[3/5] resolving versions", resolve, lock)
        locked = self.path / "requirements.txt"
        found = json.loads(report.read_text())
        lines = resolved(found)
        if self.flavour == "cpu":
            refuse_cuda(lines)
        hashes = kept_hashes(found, lines)
        locked.write_text("".join(f"{line} {hashes[line]}\n" for line in lines))
        # Given hashes, pip requires them of all.
        install = ["install", "--no-deps", "-r", str(locked)]
        self._pip(f"[4/5] installing {len(lines)} packages (minutes)", install, lock)
        self._pip("[5/5] checking", ["check"], lock)

    def _update_pip(self, lock: int) -> None:
        # --report came with pip 22.2, reading metadata without downloading the wheel a little later.
        query = [str(self.python), "-I", "-c", "import pip; print(pip.__version__)"]
        version = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(".")
        if int(version[0]) < 23:
            self._pip("      newer pip", ["install", "--upgrade", "pip"], lock)

    def _install_torch(self, lock: int) -> None:
        """Puts the right build of torch in first, so that the resolution after it finds it there.

        PyPI holds the CUDA build for Linux and never a local version (`+cpu`): so asking pip for that one
        costs a look at the index, and finds it only where the user's pip configuration offers one.
        """
        pin = re.search(r"^torch==(\S+)", self.constraints.read_text(), re.MULTILINE)
        assert pin, "constraints.txt pins torch"
        torch = f"torch=={pin[1]}"
        if self.flavour == "cuda":
            if self.torch_index:
                self._pip("[2/5] torch", ["install", "--index-url", self.torch_index, torch], lock)
            return
        if sys.platform == "linux":  # elsewhere the only build is the CPU's, and has no local version
            torch += "+cpu"
        index = self.torch_index
        if not index and not self._offered(torch):
            index = CPU_INDEX
        source = ["--index-url", index] if index else []
        self._pip(
            f"[2/5] {torch} from {index or 'pip as configured'}",
            ["install", "--no-deps", *source, torch],
            lock,
        )

    def _offered(self, requirement: str) -> bool:
        ask = [str(self.python), "-I", "-m", "pip", "install", "--dry-run", "--no-deps", "-q", requirement]
        return subprocess.run(ask, capture_output=True, env=clean_environment()).returncode == 0

    def _pip(self, title: str, arguments: list[str], lock: int) -> None:
        quiet = ["--no-input", "--disable-pip-version-check"]
        self._run(title, [str(self.python), "-I", "-m", "pip", *quiet, *arguments], lock)

    def _run(self, title: str, command: list[str], lock: int) -> None:
        """Runs one step with its output in the log, saying every half minute that it is alive."""
        say(title)
        start = time.monotonic()
        with open(self.log, "a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(),
                pass_fds=[lock],
            )
            while True:
                try:
                    status = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    say(f"      ... {time.monotonic() - start:.0f} s")
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise SetupError(
                f"{tail}\nfailed: {title.strip()} (exit code {status}); everything it said: {self.log}"
            )


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would make pip look into the clone."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def requirement_of(item: dict[str, Any]) -> str:
    """The exact requirement of one entry of pip's installation report."""
    return f"{item['metadata']['name']}=={item['metadata']['version']}"


def resolved(report: dict[str, Any]) -> list[str]:
    """The exact requirements that pip's installation report would install, sorted."""
    return sorted(map(requirement_of, report["install"]))


def normal(requirement: str) -> str:
    """`Name_x==1` as `name-x==1`."""
    name, _, version = requirement.partition("==")
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version}"


def hashes_of(text: str) -> dict[str, list[str]]:
    """The `--hash=` options of a file as uv and pip-compile write it, by normal requirement."""
    found: dict[str, list[str]] = {}
    for block in text.replace("\\\n", " ").splitlines():
        if block.strip() and not block.startswith("#"):
            words = block.split()
            found[normal(words[0])] = [word for word in words if word.startswith("--hash=")]
    return found


def kept_hashes(report: dict[str, Any], lines: list[str]) -> dict[str, str]:
    """Options by line: the hashes kept here, else (CUDA's libraries) the index's; where it gives none, none for all."""
    kept = hashes_of(HASHES.read_text() if HASHES.exists() else "")
    if unknown := [line for line in lines if normal(line) not in kept]:
        say(f"      no hash is kept of {', '.join(unknown)}: the index's own are taken")
    options = {}
    for line, item in zip(lines, sorted(report["install"], key=requirement_of), strict=True):
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        options[line] = " ".join(kept.get(normal(line), [f"--hash=sha256:{digest}"] if digest else []))
    return options if all(options.values()) else dict.fromkeys(lines, "")


def refuse_cuda(lines: list[str]) -> None:
    """Stops before pip downloads gigabytes that this machine has no use for.

    Raises:
        SetupError: a CUDA package is in the resolution.
    """
    names = {line.split("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines}
    found = sorted(name for name in names - SMALL_NVIDIA if CUDA_PACKAGE.fullmatch(name))
    if found or any(line.startswith("torch==") for line in lines):
        what = ", ".join(found) or "another torch"
        raise SetupError(
            f"the resolution would install {what}, but torch is for the CPU; for CUDA: make setup TORCH=cuda"
        )


def require_build_tools() -> None:
    """Sees that venv works and, where megatron-core has no wheel (Python 3.12), that it can be compiled.

    As root on Debian what is missing is installed.

    Raises:
        SetupError: something is missing and cannot be installed here.
    """
    missing = missing_packages()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing Debian packages: {' '.join(missing)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-yq", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], stdout=sys.stderr, env=environment)
        missing = missing_packages()
    if missing:
        raise SetupError(
            f"{sys.executable} lacks {', '.join(missing)}: install what Debian calls by these names"
        )


def missing_packages() -> list[str]:
    """What the set-up needs and this machine lacks, by the names of Debian's packages."""
    version = "python{}.{}".format(*sys.version_info[:2])
    missing = []
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        missing.append(f"{version}-venv")
    if sys.version_info >= (3, 12):
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            missing.append(f"{version}-dev")
        if not (shutil.which("c++") or shutil.which("g++")):
            missing.append("g++")
    return missing


def main() -> NoReturn:
    """Runs one command: `python` makes the environment and prints its interpreter, `find` only prints that of one that
    is there, `clean` removes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["python", "find", "clean"])
    parser.add_argument("--torch", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--torch-index", default="", help="take torch from this index")
    parser.add_argument(
        "--extras", default="dev,search,device,evaluation", help="extras of pyproject.toml, comma-separated"
    )
    options = parser.parse_args()
    try:
        environment = Environment(
            options.torch, options.torch_index, list(filter(None, options.extras.split(",")))
        )
        if options.command == "clean":
            with environment.locked():
                shutil.rmtree(environment.path, ignore_errors=True)
            say(f"removed {environment.path}")
        elif options.command == "find":
            python = environment.found()
            if python is None:
                sys.exit("no environment yet: make setup")
            print(python)
        else:
            environment.make()
            print(environment.python)
    except SetupError as error:
        sys.exit(f"set-up failed: {error}")
    except KeyboardInterrupt:
        sys.exit("set-up interrupted; the next one starts it anew")
    sys.exit(0)


if __name__ == "__main__":
    main()
