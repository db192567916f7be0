"""`make setup` as a user types it, in copies of the clone whose pins are tiny wheels in a local index."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = """
[project]
name = "nemo_minitron"
version = "0.1.0"
dependencies = ["torch", "small-package"]
[project.optional-dependencies]
dev = ["pytest"]
cublas = ["asks-for-cublas"]
"""
# Stands in for pytest: ends with the exit code that the test asks for.
PYTEST = "import os, sys\nsys.exit(int(os.environ['PYTEST_CODE']))"


def add_wheel(index: Path, name: str, version: str, requires: str = "", module: str = "") -> None:
    """Writes a wheel with one module and lists it in a package index on disk."""
    stem = name.replace("-", "_")
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{stem}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{stem}/__init__.py", f"__version__ = {version!r}\n")
        file.writestr(f"{stem}/__main__.py", module)
        info = f"{stem}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(links)


class Clone:
    """A copy of what a set-up uses, with its own home for environments and its own package index."""

    def __init__(self, path: Path, home: Path, index: Path) -> None:
        self.path, self.home = path, home
        (path / "tests").mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", path)
        shutil.copytree(ROOT / "scripts", path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        (path / "pyproject.toml").write_text(PYPROJECT)
        (path / "constraints.txt").write_text("torch==1.0\nsmall-package==1.0\n")
        dropped = ("PIP_", "PYTHON", "MAKE", "MFLAGS", "TORCH", "EXTRAS", "ARGS")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        self.env |= {
            "NEMO_MINITRON_HOME": str(home),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": index.as_uri(),
            "PIP_RETRIES": "0",
            "PIP_DEFAULT_TIMEOUT": "5",
            "PYTHON": sys.executable,
            "TORCH": "cpu",
            "EXTRAS": "dev",
        }

    def start(self, target: str, **env: str) -> subprocess.Popen[str]:
        """Starts `make -s TARGET` in a process group of its own."""
        return subprocess.Popen(
            ["make", "-s", target],
            cwd=self.path,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def make(self, target: str, **env: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `make -s TARGET`."""
        process = self.start(target, **env)
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, stdout, stderr

    def environments(self) -> list[Path]:
        """What lies in the home, finished or not."""
        return sorted(path for path in (self.home / "envs").glob("*") if path.is_dir())


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index as on a machine whose pip offers a CPU build beside the usual one."""
    index = tmp_path_factory.mktemp("index")
    add_wheel(index, "torch", "1.0", requires="nvidia-cublas-cu12")
    add_wheel(index, "torch", "1.0+cpu")
    add_wheel(index, "nvidia-cublas-cu12", "12.1")
    add_wheel(index, "asks-for-cublas", "1.0", requires="nvidia-cublas-cu12")
    add_wheel(index, "small-package", "1.0")
    add_wheel(index, "small-package", "2.0")
    add_wheel(index, "pytest", "9.0", module=PYTEST)
    return index


@pytest.fixture
def clone(tmp_path: Path, index: Path) -> Clone:
    """A clone on a machine where nothing has been set up."""
    return Clone(tmp_path / "clone", tmp_path / "home", index)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, index: Path) -> Clone:
    """A clone whose set-up has been made; tests leave it as it is."""
    directory = tmp_path_factory.mktemp("ready")
    clone = Clone(directory / "clone", directory / "home", index)
    code, stdout, stderr = clone.make("setup")
    assert code == 0, stderr
    assert "set-up done in" in stderr
    assert stdout.startswith("environment: ")
    return clone


def run(python: str, code: str) -> str:
    """What the interpreter prints for this code."""
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_pins_are_installed_for_the_cpu(ready: Clone) -> None:
    code, stdout, stderr = ready.make("python")
    assert (code, stderr, len(stdout.splitlines())) == (0, "", 1)
    python = stdout.strip()
    assert Path(python).is_relative_to(ready.home)
    assert (
        run(python, "import torch, small_package as s; print(torch.__version__, s.__version__)")
        == "1.0+cpu 1.0"
    )
    installed = run(python, "import importlib.metadata as m; print(*[d.name for d in m.distributions()])")
    assert "nvidia-cublas-cu12" not in installed
    assert "nemo_minitron" not in installed  # each clone's own is used


def test_another_clone_takes_the_same_environment_at_once(ready: Clone, tmp_path: Path, index: Path) -> None:
    other = Clone(tmp_path / "elsewhere", ready.home, index)
    start = time.monotonic()
    code, stdout, stderr = other.make("python")
    assert time.monotonic() - start < 10
    assert (code, stderr) == (0, "")
    assert stdout == ready.make("python")[1]
    assert len(ready.environments()) == 1


@pytest.mark.parametrize(
    "change",
    [
        "lint",
        pytest.param("constraints", marks=pytest.mark.slow),
        pytest.param("dependencies", marks=pytest.mark.slow),
    ],
)
def test_only_what_is_installed_names_the_environment(
    ready: Clone, tmp_path: Path, index: Path, change: str
) -> None:
    other = Clone(tmp_path / "elsewhere", ready.home, index)
    pyproject = other.path / "pyproject.toml"
    if change == "constraints":
        (other.path / "constraints.txt").write_text("torch==1.0\nsmall-package==3.0\n")
    elif change == "dependencies":
        pyproject.write_text(pyproject.read_text().replace('"small-package"', '"missing-package"'))
    else:
        pyproject.write_text(pyproject.read_text() + "[tool.ruff]\nline-length = 99\n")
    code, _, stderr = other.make("python")
    if change == "lint":
        assert (code, stderr) == (0, "")
    else:  # another environment, which the index cannot supply
        assert code != 0
        assert "No matching distribution found" in stderr or "ResolutionImpossible" in stderr


def test_a_file_that_is_not_the_pinned_one_is_refused(clone: Clone) -> None:
    (clone.path / "supply_chain").mkdir()
    (clone.path / "supply_chain" / "hashes.txt").write_text(
        f"small-package==1.0 \\\n    --hash=sha256:{'0' * 64}\n"
    )
    code, stdout, stderr = clone.make("python")
    assert (code != 0, stdout) == (True, "")
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in stderr
    (environment,) = clone.environments()
    assert list(environment.glob("lib/*/site-packages/small_package*")) == []


@pytest.mark.parametrize(
    ("pytest_code", "slow_tests", "expected"), [(0, 1, 0), (5, 0, 0), (5, 1, 2), (1, 0, 2)]
)
def test_no_slow_test_selected(ready: Clone, pytest_code: int, slow_tests: int, expected: int) -> None:
    (ready.path / "tests" / "test_x.py").write_text("@pytest.mark.slow\n" * slow_tests)
    code, _, stderr = ready.make("test-slow", PYTEST_CODE=str(pytest_code))
    assert code == expected, stderr


def test_cuda_packages_are_refused_on_a_cpu(clone: Clone) -> None:
    code, stdout, stderr = clone.make("python", EXTRAS="dev,cublas")
    assert (code != 0, stdout) == (True, "")
    assert "would install nvidia-cublas-cu12" in stderr
    assert "TORCH=cuda" in stderr
    (environment,) = clone.environments()
    assert list(environment.glob("lib/*/site-packages/nvidia_cublas*")) == []
    assert list(environment.glob("lib/*/site-packages/asks_for*")) == []


@pytest.mark.slow
def test_a_gpu_takes_the_build_with_cuda(tmp_path: Path) -> None:
    usual, smi = tmp_path / "usual", tmp_path / "bin" / "nvidia-smi"
    add_wheel(usual, "torch", "1.0", requires="nvidia-cublas-cu12")
    for name in ("nvidia-cublas-cu12", "small-package", "pytest"):
        add_wheel(usual, name, "1.0")
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho GPU 0")
    smi.chmod(0o755)
    clone = Clone(tmp_path / "clone", tmp_path / "home", usual)
    code, stdout, stderr = clone.make("python", TORCH="auto", PATH=f"{smi.parent}:{os.environ['PATH']}")
    assert code == 0, stderr
    assert "torch for cuda" in stderr
    assert run(stdout.strip(), "import torch, nvidia_cublas_cu12; print(torch.__version__)") == "1.0"


@pytest.mark.slow
def test_the_cpu_index_where_pip_offers_no_cpu_build(tmp_path: Path) -> None:
    usual, cpu = tmp_path / "usual", tmp_path / "cpu"
    add_wheel(usual, "torch", "1.0", requires="nvidia-cublas-cu12")
    add_wheel(usual, "small-package", "1.0")
    add_wheel(usual, "pytest", "9.0")
    add_wheel(cpu, "torch", "1.0+cpu")
    clone = Clone(tmp_path / "clone", tmp_path / "home", usual)
    code, _, stderr = clone.make("python")
    assert code != 0  # PyTorch's index has no such old build, where it can be reached at all
    assert "torch==1.0+cpu from https://download.pytorch.org/whl/cpu" in stderr
    code, stdout, stderr = clone.make("python", TORCH_INDEX=cpu.as_uri())
    assert code == 0, stderr
    assert run(stdout.strip(), "import torch; print(torch.__version__)") == "1.0+cpu"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["[1/5]", "[3/5]", "[4/5]"])
def test_a_killed_set_up_is_made_anew(clone: Clone, step: str) -> None:
    process = clone.start("setup")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(step):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (unfinished,) = clone.environments()
    code, stdout, stderr = clone.make("python")
    assert code == 0, stderr
    assert "left unfinished" in stderr
    assert stdout.strip() == str(unfinished / "bin" / "python")
    assert clone.make("python")[2] == ""


@pytest.mark.slow
def test_two_set_ups_at_once(clone: Clone, tmp_path: Path, index: Path) -> None:
    other = Clone(tmp_path / "other", clone.home, index)
    first, second = clone.start("python"), other.start("python")
    outputs = [process.communicate(timeout=300) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert outputs[0][0] == outputs[1][0]
    said = outputs[0][1] + outputs[1][1]
    assert said.count("setting up") == 1
    assert len(clone.environments()) == 1


@pytest.mark.slow
def test_clean_env_removes_it(clone: Clone) -> None:
    assert clone.make("setup")[0] == 0
    assert len(clone.environments()) == 1
    assert clone.make("clean-env")[0] == 0
    assert clone.environments() == []


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("PYTHON", "/bin/false", "PYTHON=/bin/false"),
        ("EXTRAS", "dev,nothing", "no extra 'nothing'"),
        ("TORCH", "gpu", "invalid choice: 'gpu'"),
    ],
)
def test_a_choice_that_does_not_exist(clone: Clone, variable: str, value: str, says: str) -> None:
    code, stdout, stderr = clone.make("python", **{variable: value})
    assert (code != 0, stdout) == (True, "")
    assert says in stderr
    assert clone.environments() == []
