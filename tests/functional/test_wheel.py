"""The wheel: installed somewhere else, the recipes run by name, with their configurations and the demo teacher."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.commands import ROOT

pytestmark = pytest.mark.slow
PACKED = (
    "nemo_minitron",
    "conf",
    "assets",
    "recipes",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "PYTHONHOME", "RANK", "WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("NEMO_MINITRON_")}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in PACKED:
        source = ROOT / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    made = call(sys.executable, "-m", "pip", "wheel", ".", *options, "-w", copy / "dist", cwd=copy)
    assert made.returncode == 0, made.stderr
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' directory of a venv that finds the libraries where this environment has them."""
    venv = tmp_path_factory.mktemp("venv")
    assert call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv).returncode == 0
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps"]
    done = call(*pip, "--no-index", "--disable-pip-version-check", wheel, cwd=venv)
    assert done.returncode == 0, done.stderr
    return venv / "bin"


def test_what_it_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("conf", "*.yaml"), ("assets", "*")):
        files = {p.relative_to(ROOT) for p in (ROOT / folder).rglob(pattern) if p.is_file()}
        assert {f"nemo_minitron/{path}" for path in files} <= names
    modules = {p.relative_to(ROOT) for p in (ROOT / "nemo_minitron").rglob("*.py")}
    assert {str(path) for path in modules} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "assets/"))]


def test_it_explains_and_refuses_where_there_is_no_clone(installed: Path, tmp_path: Path) -> None:
    for command in ([installed / "nemo-minitron"], [installed / "python", "-m", "nemo_minitron"]):
        explained = call(*command, "prune", "+conf=width", "--help", cwd=tmp_path)
        assert explained.returncode == 0, explained.stderr
        assert "  hidden_size: 3/4" in explained.stdout
        refused = call(*command, "prune", "+conf=width", "prune.hidden_size=999", cwd=tmp_path)
        assert refused.returncode == 2, refused.stderr
        (line,) = refused.stderr.splitlines()
        assert "hidden_size=999: larger than the source's 192" in line, "the demo teacher was not found"
    refused = call(installed / "nemo-minitron", "prune", "+conf=width", "+cluster=slurm", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "from a clone" in refused.stderr
    assert list(tmp_path.iterdir()) == []
