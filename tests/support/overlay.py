"""Other versions of packages, in a directory to be the first on PYTHONPATH: the environment itself stays as it is."""

import hashlib
import subprocess
import sys
from pathlib import Path

from nemo_minitron.config.data import DataConfig
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.files import making_once


def overlay(hashes: Path) -> Path:
    """The directory with what a file of exact versions and hashes names; installed once, in the user's cache.

    Raises:
        CalledProcessError: pip could not, for want of a network too.
    """
    key = hashlib.sha256(hashes.read_bytes() + sys.version.encode()).hexdigest()[:16]
    place = cache_dir(DataConfig(), "overlays") / key
    if not place.exists():
        with making_once(place) as partial:
            options = ["-q", "--no-deps", "--no-compile", "--require-hashes", "--target", str(partial)]
            install = [sys.executable, "-m", "pip", "install", *options, "-r", str(hashes)]
            subprocess.run(install, check=True, timeout=300)
    return place
