"""A headless Chromium: the system's, or one of its own out of Debian's archive, unpacked beside it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_CACHE = Path("~/.cache/nemo_minitron/tests/chromium").expanduser()
_BINARY = Path("usr/lib/chromium/chromium-headless-shell")
_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
    "--enable-logging=stderr",
)


class Browser:
    """What a page does in it. `home`: for its files."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.command, self.environment = _installed() or _unpacked()

    def run(self, page: Path, *options: str) -> tuple[str, str]:
        """(standard output, lines of the console) of a page that was opened; fails where the browser does."""
        done = subprocess.run(
            [*self.command, *_OPTIONS, f"--user-data-dir={self.home / 'profile'}", *options, page.as_uri()],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    def asked_for(self, page: Path) -> str:
        """All that the network stack was asked for, as JSON."""
        log = self.home / "net.json"
        self.run(page, f"--log-net-log={log}", "--dump-dom")
        return log.read_text()


def _installed() -> tuple[list[str], dict[str, str]] | None:
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    return None if found is None else ([found, *(["--headless"] if "headless" not in found else [])], {})


def _unpacked() -> tuple[list[str], dict[str, str]]:
    root = _CACHE / "root"
    if not (root / _BINARY).exists():
        if shutil.which("apt-get") is None or os.geteuid():
            pytest.skip("no Chromium (chromium-headless-shell), and no apt-get as root to fetch one")
        archives = _CACHE / "archives"
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        # Fetched into a directory of its own; nothing is installed.
        fetch = f"apt-get install -y -qq --no-install-recommends --download-only -o Dir::Cache::archives={archives}"
        done = subprocess.run(
            [*fetch.split(), "chromium-headless-shell"], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"chromium-headless-shell cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
        for archive in archives.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True)
    libraries = sorted({str(file.parent) for file in root.rglob("*.so*")})
    return [str(root / _BINARY)], {"LD_LIBRARY_PATH": ":".join(libraries)}
