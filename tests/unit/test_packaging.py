"""What the package promises about itself: light imports, layers, pins that fit the declared dependencies."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import nemo_minitron

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemo_minitron"
FRAMEWORK_FOLDERS = {"nemo", "alignment", "cpu_compat", "workflows"}
# Classes derived from lm-evaluation-harness's.
WITH_LM_EVAL = {f"nemo_minitron.evaluation.benchmarks.{name}" for name in ("adapter", "backend")}
FRAMEWORKS = {"nemo", "nemo_aligner", "nemo_run", "lightning", "pytorch_lightning"}
CORE = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in FRAMEWORK_FOLDERS
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def module_name(path: Path) -> str:
    """The dotted name of one of the package's files."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The top-level packages that a file names in an import, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
            if node.module == "nemo_minitron":
                names |= {f"nemo_minitron.{alias.name}" for alias in node.names}
            elif node.module.startswith("nemo_minitron."):
                names.add(".".join(node.module.split(".")[:2]))
    return names


def imported_at_once(path: Path) -> set[str]:
    """The modules, and names of them, that a file imports at once: not in functions, nor for a type checker alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    return names


def test_version() -> None:
    assert nemo_minitron.__version__ == PROJECT["project"]["version"]


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, nemo_minitron; print([m for m in ('torch', 'megatron', 'nemo', 'hydra') if m in sys.modules])"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 3
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_names_no_framework(path: Path) -> None:
    forbidden = FRAMEWORKS | {f"nemo_minitron.{folder}" for folder in ("nemo", "alignment", "workflows")}
    assert imported(path) & forbidden == set()


def test_the_core_loads_no_framework() -> None:
    """One process imports every module of the core: none may pull in NeMo or Lightning at import."""
    names = [module_name(path) for path in CORE]
    assert len(names) > 10
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({FRAMEWORKS!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_an_extra_brings_is_imported_where_it_is_used() -> None:
    """NGC's image and `pip install nemo_minitron` have no extras: every recipe ran into gguf there."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    brought = {Requirement(line).name.replace("-", "_") for lines in extras for line in lines}
    assert {"gguf", "optuna", "cma", "lm_eval", "wandb"} <= brought
    for path in sorted(PACKAGE.rglob("*.py")):
        names = {
            name for name in imported_at_once(path) if name in WITH_LM_EVAL or name.split(".")[0] in brought
        }
        assert not names or module_name(path) in WITH_LM_EVAL, (path, names)


def test_only_the_package_is_packaged() -> None:
    found = find_packages(str(ROOT), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    assert "nemo_minitron" in found
    assert {name.split(".")[0] for name in found} == {"nemo_minitron"}
    folders = {module_name(path.parent) for path in PACKAGE.rglob("*.py")}
    assert folders == set(found), "a folder with modules has no __init__.py, or the other way round"


def test_every_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    project = PROJECT["project"]
    optional = [
        line for extra in ("dev", "search", "wandb") for line in project["optional-dependencies"][extra]
    ]
    for line in [*project["dependencies"], *optional]:
        wanted = Requirement(line)
        pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert pins, f"{line}: not in constraints.txt"
        for pin in pins:
            (version,) = [specifier.version for specifier in pin.specifier if specifier.operator == "=="]
            assert wanted.specifier.contains(version), f"{line} does not allow {pin}"


def test_pins_are_exact_and_come_from_an_index() -> None:
    for pin in PINS:
        assert re.fullmatch(r"==[^,*+]+", str(pin.specifier)), pin
        assert pin.url is None, pin
    names = {canonicalize_name(pin.name) for pin in PINS}
    cuda = {name for name in names if re.match(r"nvidia-(cu|nccl|nv)|cuda-|triton", name)}
    assert cuda == set()


def test_each_python_has_one_pin_for_a_package() -> None:
    for python in ("3.11", "3.12"):
        applicable = [
            canonicalize_name(pin.name)
            for pin in PINS
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(applicable) == len(set(applicable)), python


def test_this_environment_is_the_pinned_one() -> None:
    """The tests say something about the pins only if they run on them."""
    for pin in PINS:
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        assert pin.specifier.contains(installed.split("+")[0]), (
            f"{pin.name} {installed}, constraints.txt: {pin}"
        )


@pytest.mark.parametrize(
    "folder", ["nemo_minitron", "recipes", "launchers", "scripts", "tests", "benchmarks"]
)
def test_files_stay_readable(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length >= 400} == {}


def test_recipes_are_thin() -> None:
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
