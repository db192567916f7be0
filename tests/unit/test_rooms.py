"""The floor plan of the package: which room may import which, what is light, and how long a function may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemo_minitron"
# From the ground up: a room imports from those before it. Rooms of one line do not import each other.
FLOORS = [
    ["__version__", "errors", "environment", "scratch", "parallel", "axes"],
    ["files", "arch", "padding", "megatron_gpt", "progress", "wording"],
    ["config"],
    ["cpu_compat"],
    ["checkpoints"],
    ["data"],
    ["evaluation", "export", "synthesis"],
    ["importance", "merging"],
    ["pruning", "distillation"],
    ["search", "planning"],
    ["report", "comparison"],
    ["nemo"],
    ["alignment"],
    ["workflows"],
    ["run"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FUNCTION = 40  # lines, without its docstring
LATE_IMPORTS = 20
NEMO_MODULES = 18


def modules() -> Iterator[tuple[Path, str, ast.Module]]:
    """(file, its room, its tree) of all modules of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield file, "__version__" if first == "__init__" else first, ast.parse(file.read_text())


def own_imports(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """(line, rooms) of each import of the package's own modules, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "nemo_minitron":
                yield node.lineno, parts[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms = [parts[1] for parts in names if parts[0] == "nemo_minitron" and len(parts) > 1]
            if rooms:
                yield node.lineno, rooms


def test_imports_point_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {room} imports {other}"
        for file, room, tree in modules()
        for line, others in own_imports(tree)
        for other in others
        if other != room and FLOOR[other] >= FLOOR[room]
    ]
    assert wrong == []


def test_no_two_modules_import_each_other() -> None:
    """Neither directly nor round about, late imports and those for types included."""
    names = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): tree
        for f, _, tree in modules()
    }
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, tree in names.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in names:
                found = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (found & set(names) or {node.module}) - {name}
    for name in names:
        seen, waiting = set(), [name]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                assert other != name, f"{name} imports itself, by way of {sorted(seen)[:5]}"
                seen.add(other)
                waiting.append(other)


def test_every_room_has_its_floor() -> None:
    assert {room for _, room, _ in modules()} == set(FLOOR)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body
    has_docstring = ast.get_docstring(function) is not None
    told = body[0].end_lineno - body[0].lineno + 1 if has_docstring else 0  # type: ignore[operator]
    return function.end_lineno - function.lineno + 1 - told  # type: ignore[operator]


def test_functions_are_short() -> None:
    long = [
        f"{file.relative_to(ROOT)}: {function.name}: {lines_of(function)} lines"
        for file, _, tree in modules()
        for function in functions(tree)
        if lines_of(function) > LONGEST_FUNCTION
    ]
    assert long == []


def test_few_imports_are_late() -> None:
    """Each hides something heavy from what is light, or waits for a gap to be closed, and says so."""
    late = {
        f"{file.relative_to(ROOT)}:{line}": file.read_text().splitlines()[line - 1]
        for file, _, tree in modules()
        for function in functions(tree)
        for line, _ in own_imports(function)
    }
    assert len(late) <= LATE_IMPORTS, sorted(late)
    # The docstring of the CPU layer says it for all of its own.
    silent = [
        place for place, code in late.items() if "  # " not in code and "cpu_compat/__init__" not in place
    ]
    assert not silent, "say why"


def test_the_room_of_adapters_is_small() -> None:
    files = [file for file in (PACKAGE / "nemo").glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= NEMO_MODULES, [file.name for file in files]


@pytest.fixture(scope="module")
def loaded_by_checks() -> set[str]:
    checks = sorted((PACKAGE / "workflows").glob("*/check.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in checks]
    assert len(names) > 10
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_checks_are_light(loaded_by_checks: set[str]) -> None:
    """What refuses a command in a second imports neither NeMo nor Lightning, nor Megatron's models."""
    heavy = (
        "nemo",
        "nemo_aligner",
        "lightning",
        "pytorch_lightning",
        "nemo_minitron.nemo",
        "megatron.core.models",
    )
    assert [name for name in heavy if name in loaded_by_checks] == []
