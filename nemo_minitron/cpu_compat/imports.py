"""Imports that wait until they are used: NeMo 2.4.1 imports speech, BERT, ModelOpt, pandas, sklearn, scipy and torch's
compiler, which are most of its 13 CPU seconds, and a GPT run uses none of them.

A deferred module is the real one, in `sys.modules` under its name. `import x` binds it without running it; the first
attribute that it lacks runs it. A module below it can be imported before it has run. The packages of `_GATHERERS` have
an `__init__` that gathers names out of their submodules: `from x import name` imports the submodule that defines `name`
and runs the `__init__` only where that cannot be told from its text. A base class or an `isinstance` at import time
therefore gets the real thing, at once.

Nothing here depends on CUDA. NEMO_MINITRON_EAGER_IMPORTS=1 leaves Python's imports as they are.
"""

import ast
import contextlib
import functools
import gc
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from nemo_minitron.cpu_compat.after_import import AFTER

EAGER = "NEMO_MINITRON_EAGER_IMPORTS"

# Packages, with those below them, whose __init__ gathers names.
_GATHERERS = ("nemo.collections", "nemo_run", "torchmetrics")
# Modules that run as a whole or not at all.
_WHOLE = (
    "datasets",
    "fabric",
    "matplotlib",
    "modelopt",
    "modelopt.torch",
    "modelopt.torch.opt",
    "nltk",
    "numba",
    "pandas",
    "paramiko",
    "peft",
    "sacrebleu",
    "scipy.signal",
    "scipy.stats",
    "sklearn",
    "sklearn.metrics",
)
# Names that are known without the module: a logger; a function that its users import and mostly never call.
_LOGGERS = {"torchmetrics": "_logger"}
_VERSIONS = ("torchmetrics",)
_FUNCTIONS = {"sklearn.metrics": "roc_curve"}
_MACHINERY = ("__path__", "__file__", "__cached__")

_Origin = tuple[str, str | None] | None


def defer() -> bool:
    """From here on the modules that this file names wait until they are used. Returns whether that is on."""
    if os.environ.get(EAGER, "0") not in ("", "0"):
        return False
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return True


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Keep the garbage collector from walking, again and again, the objects that imports make and nothing frees."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


class _Finder:
    """Gives the modules of this file loaders that wait; all others are found as ever."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        if not (name in AFTER or name in _WHOLE or _below(name, _GATHERERS)):
            was_there = name in sys.modules  # a reload
            _run_the_whole_above(name)
            # What ran may have imported this very module. Made again, it would lack its submodules.
            return _spec_of_loaded(sys.modules[name]) if name in sys.modules and not was_there else None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return spec
        if name in AFTER:
            spec.loader = _ChangingLoader(name, spec.loader.path)
        elif name in _WHOLE or spec.submodule_search_locations is not None:
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _LoadedLoader:
    """Gives the import system a module that is there already."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: Any) -> types.ModuleType:
        """The module as it is."""
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        """It has run; only its own spec was replaced."""
        module.__spec__ = self.spec


def _spec_of_loaded(module: types.ModuleType) -> Any:
    """A spec that leads to `module`. The module gets it until then: where a module appeared during the search, the
    import system goes by that module's own spec, which would execute it again (`importlib._bootstrap._find_spec`)."""
    spec = importlib.machinery.ModuleSpec(module.__name__, _LoadedLoader(module))  # type: ignore[arg-type]
    module.__spec__ = spec
    return spec


class _ChangingLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module, and what `after_import` has for it."""
        super().exec_module(module)
        AFTER[self.name](module)


class _Loader(importlib.machinery.SourceFileLoader):
    """Makes a `_Deferred`, runs it later."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self.lock, self.running = threading.RLock(), False

    def create_module(self, spec: Any) -> types.ModuleType:
        """A module that has not run."""
        return _Deferred(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing yet; a second time (`importlib.reload`) as ever."""
        if type(module) is not _Deferred:
            super().exec_module(module)

    def run(self, module: types.ModuleType) -> None:
        """Execute the module in its own namespace, as importing it would have done."""
        _run_the_whole_above(self.name)
        if type(module) is not _Deferred:
            return  # the package above had use for it
        self.running = True
        try:
            super().exec_module(module)
            if type(module) is _Deferred:
                module.__class__ = types.ModuleType  # type: ignore[assignment]
        finally:
            self.running = False


class _Deferred(types.ModuleType):
    """A module that has not run yet; of class `ModuleType` once it has."""

    def __getattr__(self, name: str) -> Any:
        """Only names that are missing come here: get the part that defines `name`, or run the module."""
        loader: _Loader = vars(self)["__spec__"].loader
        # Who only asks what kind of module this is (`__path__`, `__wrapped__`, ...) need not run it.
        if not name.startswith("__") or (name not in _MACHINERY and name in _text(loader.path)):
            with loader.lock:
                if type(self) is _Deferred and not loader.running and not _gives_part(self, name):
                    loader.run(self)
                if name in vars(self) or type(self) is not _Deferred:
                    return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Python binds an imported submodule in its package; that must not hide what the package calls by the name."""
        submodule = isinstance(value, types.ModuleType) and value.__name__ == f"{self.__name__}.{name}"
        if submodule and _origins(self).get(name, (value.__name__, None)) != (value.__name__, None):
            return
        super().__setattr__(name, value)


def _gives_part(module: types.ModuleType, name: str) -> bool:
    """Whether `name` could be bound from the one submodule that defines it."""
    if _LOGGERS.get(module.__name__) == name:
        vars(module)[name] = logging.getLogger(module.__name__)
        return True
    if _FUNCTIONS.get(module.__name__) == name:
        vars(module)[name] = _deferred_function(module, name)
        return True
    if name == "__version__" and module.__name__ in _VERSIONS:
        vars(module)[name] = importlib.metadata.version(module.__name__)
        return True
    if not _gathers(module) or name.startswith("__"):
        return False
    origin = _origins(module).get(name, (f"{module.__name__}.{name}", None))
    if origin is None:
        return False
    try:
        value = _part(*origin)
    except (ImportError, AttributeError):
        return False
    vars(module).setdefault(name, value)
    return True


def _deferred_function(module: types.ModuleType, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if vars(module).get(name) is call:
            module.__spec__.loader.run(module)  # type: ignore[union-attr]
        return getattr(module, name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__module__ = module.__name__
    return call


def _part(target: str, attribute: str | None) -> Any:
    found = importlib.import_module(target)
    if attribute is None:
        return found
    with contextlib.suppress(AttributeError):
        return getattr(found, attribute)
    return importlib.import_module(f"{target}.{attribute}")


def _run_the_whole_above(name: str) -> None:
    """Modules below a package of `_WHOLE` count on what its `__init__` did."""
    parent, _, _ = name.rpartition(".")
    module = sys.modules.get(parent)
    if parent in _WHOLE and type(module) is _Deferred and not module.__spec__.loader.running:  # type: ignore[union-attr]
        module.__spec__.loader.run(module)  # type: ignore[union-attr]


def _below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _gathers(module: types.ModuleType) -> bool:
    return "__path__" in vars(module) and _below(module.__name__, _GATHERERS)


def _origins(module: types.ModuleType) -> dict[str, _Origin]:
    """Where the names of a gathering package come from: (module, its attribute, or None for the module itself); None
    for a name that its `__init__` makes in another way. Empty for all other modules."""
    return _read_origins(module.__name__, module.__spec__.loader.path) if _gathers(module) else {}  # type: ignore[union-attr]


@functools.cache
def _read_origins(package: str, path: str) -> dict[str, _Origin]:
    origins: dict[str, _Origin] = {}
    for name, origin in _bindings(ast.parse(_text(path)).body, package):
        origins[name] = origin if origins.get(name, origin) == origin else None
    return origins


def _bindings(statements: list[Any], package: str) -> Iterator[tuple[str, _Origin]]:
    """Each name that the statements bind at the top level. What a `try` gathers counts: should that import fail, the
    `__init__` runs. What an `if` or a `with` binds is for the `__init__` to say."""
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _gathered(node, package)
        elif isinstance(node, ast.Try):
            yield from _bindings(node.body, package)
            rest = [line for handler in node.handlers for line in handler.body] + node.orelse + node.finalbody
            yield from ((name, None) for name, _ in _bindings(rest, package))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, None
        else:
            inner = [line for line in ast.walk(node) if isinstance(line, ast.Import | ast.ImportFrom)]
            yield from ((name, None) for name, _ in _bindings(inner, package))
            stored = (name for name in ast.walk(node) if isinstance(name, ast.Name))
            yield from ((name.id, None) for name in stored if isinstance(name.ctx, ast.Store))


def _gathered(node: Any, package: str) -> Iterator[tuple[str, _Origin]]:
    """The names of one import statement."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield (
                alias.asname or alias.name.split(".")[0],
                (
                    alias.name if alias.asname else alias.name.split(".")[0],
                    None,
                ),
            )
            continue
        source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        if alias.name == "*":
            yield from ((name, (source, name)) for name in _public(source))
            continue
        own = (f"{source}.{alias.name}", None)
        yield alias.asname or alias.name, own if source == package else (source, alias.name)


def _public(source: str) -> list[str]:
    """The names that `from source import *` binds, as far as the text of the module tells."""
    spec = importlib.util.find_spec(source)
    if spec is None or not (spec.origin or "").endswith(".py"):
        return []
    tree = ast.parse(_text(spec.origin))  # type: ignore[arg-type]
    bound = dict(
        _bindings(tree.body, source if spec.submodule_search_locations else source.rpartition(".")[0])
    )
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            with contextlib.suppress(ValueError):
                return [name for name in ast.literal_eval(node.value) if name in bound]
    return [name for name in bound if not name.startswith("_")]


@functools.cache
def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
