"""Makes supply_chain/: the hashes of the pinned packages' files, their licences, and an SBOM.

Run by `make supply-chain`, with the environment's interpreter, after constraints.txt or constraints-newest.txt has
changed. The work is done by uv (`pip compile --generate-hashes`), pip-licenses and cyclonedx-py, which live in an
environment of their own whose files supply_chain/tools.txt pins. Only the first needs the package index; the others
look at what is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
NEWEST = ROOT / "constraints-newest.txt"
MADE = ROOT / "supply_chain"
OLDER = (
    'python_version < "3.11"'  # the marker of the lines for a Python that the tried one no longer supports
)


def tools() -> Path:
    """The directory of the tools' programs; made where it is not there."""
    pins = MADE / "tools.txt"
    key = hashlib.sha256(pins.read_bytes()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    home = Path(os.environ.get("NEMO_MINITRON_HOME", f"{cache}/nemo_minitron"))
    made = home / "tools" / key
    if not (made / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", made], check=True)
        install = ["-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", str(pins)]
        subprocess.run([f"{made}/bin/python", *install], check=True)
        (made / "complete").touch()
    return made / "bin"


def hashes(programs: Path) -> str:
    """The hashes of all files of each pinned version, those for older Pythons last."""
    older = "".join(f"{line}\n" for line in CONSTRAINTS.read_text().splitlines() if OLDER in line)
    with tempfile.TemporaryDirectory() as directory:
        wanted = Path(directory, "older.in")
        wanted.write_text(older)
        return _compiled(programs, CONSTRAINTS, "3.11") + _compiled(programs, wanted, "3.10")


def newest_hashes(programs: Path) -> str:
    """The hashes of all files of what is tried in a newer version."""
    return _compiled(programs, NEWEST, "3.11")


def _compiled(programs: Path, wanted: Path, python: str) -> str:
    options = ["--universal", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate"]
    command = [f"{programs}/uv", "pip", "compile", "-q", *options, "--python-version", python, str(wanted)]
    # A directory of files beside the index would add their hashes.
    environment = {name: value for name, value in os.environ.items() if name != "UV_FIND_LINKS"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def licences(programs: Path) -> str:
    """CSV: name, version, licence and address of what is installed."""
    # With "system": pip-licenses takes its own dependencies for that, of which the environment has some.
    options = ["--format=csv", "--with-urls", "--with-system"]
    command = [f"{programs}/pip-licenses", f"--python={sys.executable}", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sbom(programs: Path) -> str:
    """CycloneDX, as JSON, of what is installed."""
    command = [f"{programs}/cyclonedx-py", "environment", "--output-reproducible", "--of", "JSON"]
    said = subprocess.run([*command, sys.executable], check=True, capture_output=True, text=True).stdout
    return said.rstrip("\n") + "\n"


def main() -> None:
    """Writes the four files."""
    programs = tools()
    makers = {
        "hashes.txt": hashes,
        "hashes-newest.txt": newest_hashes,
        "licences.csv": licences,
        "sbom.json": sbom,
    }
    for name, make in makers.items():
        (MADE / name).write_text(make(programs))
        print(MADE / name)


if __name__ == "__main__":
    main()
