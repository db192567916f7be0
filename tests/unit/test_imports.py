"""Deferred imports: what is not used does not run; what is used is the real thing, whichever way it is asked for."""

import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.cpu_compat import after_import, imports

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[dict[str, str]], None]


def run(code: str, **environment: str) -> Any:
    """What a process of its own prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- packages made here ------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes packages that can be imported; `whole_*` are deferred as a whole, `gathers_*` by their parts."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "_WHOLE", ("whole_a", "whole_b"))
    monkeypatch.setattr(imports, "_GATHERERS", ("gathers_a",))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(imports, "_text", imports._text.__wrapped__)
    monkeypatch.setattr(imports, "_read_origins", imports._read_origins.__wrapped__)
    monkeypatch.setenv(imports.EAGER, "0")

    def put(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        importlib.invalidate_caches()
        assert imports.defer()

    yield put
    for name in set(sys.modules) - before:
        del sys.modules[name]


def ran() -> list[str]:
    """The packages made here that have run, in order: each adds itself to `os.ran`."""
    return list(vars(os).setdefault("ran", []))


@pytest.fixture(autouse=True)
def _nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ran", [], raising=False)


SAYS = "import os; os.ran.append(__name__)\n"


def test_a_module_runs_when_an_attribute_is_asked_for(write: Write) -> None:
    write({"whole_a.py": SAYS + "class A:\n    pass\nvalue = 3\n"})
    import whole_a

    assert ran() == []
    assert sys.modules["whole_a"] is whole_a
    assert not hasattr(whole_a, "__wrapped__")
    assert ran() == []
    assert whole_a.value == 3
    assert ran() == ["whole_a"]
    assert type(whole_a) is types.ModuleType
    assert type(pickle.loads(pickle.dumps(whole_a.A()))) is whole_a.A
    with pytest.raises(AttributeError, match="nothing"):
        _ = whole_a.nothing
    importlib.reload(whole_a)
    assert ran() == ["whole_a"] * 2


def test_names_are_imported_from_a_deferred_module(write: Write) -> None:
    write({"whole_a.py": SAYS + "__all__ = ['value']\nvalue = 3\nother = 4\n"})
    names: dict[str, Any] = {}
    exec("from whole_a import *", names)
    assert names["value"] == 3
    assert "other" not in names
    with pytest.raises(ImportError, match="missing"):
        exec("from whole_a import missing")


def test_a_module_below_counts_on_the_package_above(write: Write) -> None:
    write(
        {"whole_a/__init__.py": SAYS + "setting = 5\n", "whole_a/below.py": "from whole_a import setting\n"}
    )
    import whole_a

    assert ran() == []
    import whole_a.below

    assert (ran(), whole_a.below.setting) == (["whole_a"], 5)


def test_what_the_package_above_has_imported_is_not_made_again(write: Write) -> None:
    write(
        {
            "whole_a/__init__.py": SAYS + "from .below import *\n",
            "whole_a/below/__init__.py": SAYS + "from .leaf import *\n",
            "whole_a/below/leaf.py": SAYS + "value = 7\n",
        }
    )
    import whole_a.below as below

    assert ran() == ["whole_a", "whole_a.below", "whole_a.below.leaf"]
    assert (below.leaf.value, below.value) == (7, 7)
    assert below is sys.modules["whole_a"].below is sys.modules["whole_a.below"]
    assert importlib.reload(below) is below
    assert ran()[3:] == ["whole_a.below"]


def test_a_deferred_package_may_import_its_deferred_parts(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "_WHOLE", ("whole_a", "whole_a.part"))
    write(
        {
            "whole_a/__init__.py": SAYS + "from . import part\nfrom .part import value\nmade = value + 1\n",
            "whole_a/part.py": SAYS + "value = 1\n",
        }
    )
    import whole_a.part

    assert ran() == []
    assert whole_a.part.value == 1
    assert (ran(), whole_a.made) == (["whole_a", "whole_a.part"], 2)


def test_an_error_is_raised_where_the_module_is_used_and_may_pass(write: Write) -> None:
    write(
        {
            "whole_a.py": SAYS
            + "import whole_b\nif not whole_b.works: raise ImportError('broken')\nvalue = 1\n"
        }
    )
    write({"whole_b.py": "works = False\n"})
    import whole_a
    import whole_b

    with pytest.raises(ImportError, match="broken"):
        _ = whole_a.value
    whole_b.works = True
    assert whole_a.value == 1


def test_a_missing_module_is_missing(write: Write) -> None:
    write({})
    with pytest.raises(ModuleNotFoundError, match="whole_a"):
        importlib.import_module("whole_a")


def test_threads_see_a_module_that_has_run(write: Write) -> None:
    write({"whole_a.py": SAYS + "import time\nfirst = 1\ntime.sleep(0.3)\nlast = 2\n"})
    import whole_a

    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(whole_a.first + whole_a.last)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen, ran()) == ([3] * 8, ["whole_a"])


GATHERS = {
    "gathers_a/__init__.py": SAYS
    + "from gathers_a.one import One\n"
    + "from .two import two, Two as Second\n"
    + "from gathers_a import three\n"
    + "try:\n    from gathers_a.absent import four\nexcept ImportError:\n    four = 4\n"
    + "if True:\n    from gathers_a.one import five\n"
    + "from gathers_a.star import *\n"
    + "made_here = 6\n"
    + "def one():\n    return 'a function'\n",
    "gathers_a/one.py": SAYS + "class One:\n    pass\nfive = 5\n",
    "gathers_a/two.py": SAYS + "class Two:\n    pass\ndef two():\n    return 2\n",
    "gathers_a/three.py": SAYS,
    "gathers_a/star.py": SAYS + "shining = 7\n",
}


def test_a_name_imports_the_part_that_defines_it(write: Write) -> None:
    write(GATHERS)
    from gathers_a import One, Second

    assert ran() == ["gathers_a.one", "gathers_a.two"]
    assert (One.__module__, Second.__name__) == ("gathers_a.one", "Two")
    import gathers_a.three

    assert ran() == ["gathers_a.one", "gathers_a.two", "gathers_a.three"]
    assert gathers_a.One is One


@pytest.mark.parametrize(("name", "value"), [("four", 4), ("five", 5), ("made_here", 6)])
def test_what_the_text_does_not_tell_the_package_tells(write: Write, name: str, value: int) -> None:
    write(GATHERS)
    import gathers_a

    assert getattr(gathers_a, name) == value
    assert "gathers_a" in ran()


def test_a_star_gathers_what_its_module_binds(write: Write) -> None:
    write(GATHERS)
    from gathers_a import shining

    assert (shining, ran()) == (7, ["gathers_a.star"])


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_submodule_does_not_hide_a_function_of_its_name(write: Write, first: str) -> None:
    write(GATHERS)
    importlib.import_module(f"gathers_a.{first}")
    import gathers_a

    assert gathers_a.two() == 2
    assert gathers_a.one() == "a function"


def test_a_fuser_compiles_at_the_first_call(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"fuser.py": "import torch\njit_fuser = torch.compile\n"})
    monkeypatch.setitem(imports.AFTER, "fuser", after_import.fuse_when_called)
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    import fuser

    @fuser.jit_fuser
    def double(x: int) -> int:
        """Two x."""
        return 2 * x

    assert (compiled, double.__doc__, double.__name__) == ([], "Two x.", "double")
    assert (double(3), double(4)) == (6, 8)
    assert compiled == [double.__wrapped__]


# ---- NeMo's ------------------------------------------------------------------------------------------------------

NEMO = """
import json, os, pickle, sys
import nemo_minitron, nemo_minitron.cpu_compat
finders = list(sys.meta_path)
from nemo_minitron.cpu_compat import imports, prepare_nemo
assert sys.meta_path == finders
prepare_nemo()
import nemo_minitron.nemo.distill_transform, nemo_minitron.nemo.fit, nemo_minitron.nemo.trainer
from nemo.collections import llm
def has_run(name):
    return name in sys.modules and type(sys.modules[name]) is not imports._Deferred
answers = {"ran": [name for name in imports._WHOLE if has_run(name)]}
answers["ran"] += [name for name in ("nemo_run", "nemo.collections.llm", "nemo.collections.nlp") if has_run(name)]
answers["ran"] += [name for name in ("torchmetrics", "torch._inductor.compile_fx") if has_run(name)]

from nemo.collections.llm.gpt.model.base import GPTModel
answers["one class"] = llm.GPTModel is GPTModel and issubclass(llm.LlamaModel, GPTModel)

from sklearn.metrics import roc_curve
answers["no curve yet"] = not has_run("sklearn")
answers["curve"] = [list(map(float, values)) for values in roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])][:2]
import pandas
answers["frame"] = int(pickle.loads(pickle.dumps(pandas.DataFrame({"a": [1, 2]}))).a.sum())
answers["isinstance"] = [isinstance(1, pandas.DataFrame), isinstance(pandas.Series([1]), pandas.Series)]
import scipy.signal
answers["window"] = list(map(float, scipy.signal.windows.hann(3)))
from torchmetrics import Metric, MeanMetric
import torchmetrics
mean = MeanMetric()
mean.update(2.0); mean.update(4.0)
answers["mean"] = [float(mean.compute()), isinstance(mean, Metric), torchmetrics.__version__ > "1"]
print(json.dumps(answers))
"""


def test_what_a_run_uses_is_real_and_the_rest_has_not_run() -> None:
    answers = run(NEMO)
    # torchmetrics' annotations name matplotlib's classes.
    assert answers.pop("ran") == ["matplotlib"]
    assert answers == {
        "one class": True,
        "no curve yet": True,
        "curve": [[0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0]],
        "frame": 3,
        "isinstance": [False, True],
        "window": [0.0, 1.0, 0.0],
        "mean": [3.0, True, True],
    }


EAGER = """
import json, sys
from nemo_minitron import cpu_compat
from nemo_minitron.cpu_compat import imports
before = list(sys.meta_path)
cpu_compat.prepare_megatron()
print(json.dumps([imports.defer(), sys.meta_path == before, "torch._inductor.compile_fx" in sys.modules]))
"""


def test_one_variable_turns_it_off() -> None:
    assert run(EAGER, NEMO_MINITRON_EAGER_IMPORTS="1") == [False, True, True]


SPAWNED = """
import json
import torch
from nemo_minitron import cpu_compat
from tests.support import deferred_samples

if __name__ == "__main__":
    cpu_compat.prepare_nemo()
    loader = torch.utils.data.DataLoader(
        deferred_samples.Samples(), num_workers=1, multiprocessing_context="spawn", collate_fn=deferred_samples.frames
    )
    print(json.dumps([int(frame.a.sum()) for frame in loader]))
"""


@pytest.mark.slow
def test_a_spawned_worker_uses_a_deferred_package(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    assert run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')") == [1, 3]


NAMES = """
import json, sys, types
from nemo_minitron import cpu_compat
cpu_compat.prepare_nemo()
import importlib
wanted = json.loads(sys.stdin.read()) if {read} else None
answers = {{}}
for package in {packages}:
    module = importlib.import_module(package)
    names = wanted[package] if wanted else [n for n in vars(module) if not n.startswith("_")]
    answers[package] = {{}}
    for name in names:
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            answers[package][name] = ["module", value.__name__]
            continue
        where = getattr(value, "__module__", None)
        answers[package][name] = [type(value).__name__, where, getattr(value, "__qualname__", repr(value)[:40])]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_every_name_is_what_it_is_without_deferring() -> None:
    """Each public name of packages below deferred ones, and of the gathering ones that NeMo's users import from."""
    packages = ("modelopt.torch.distill", "pandas.core")
    packages += ("nemo.collections.llm", "nemo.collections.llm.gpt.model", "nemo.collections.llm.gpt.data")
    packages += ("nemo.collections.llm.peft", "nemo.collections.common.tokenizers", "torchmetrics")
    packages += ("torchmetrics.functional", "nemo.collections.nlp", "nemo.collections.nlp.modules.common")
    plain = run(NAMES.format(read=False, packages=packages), NEMO_MINITRON_EAGER_IMPORTS="1")
    code = NAMES.format(read=True, packages=packages).replace(
        "sys.stdin.read()", repr(json.dumps({package: list(names) for package, names in plain.items()}))
    )
    assert run(code) == plain
    assert sum(len(names) for names in plain.values()) > 500
