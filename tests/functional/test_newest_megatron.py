"""The core on the newest Megatron-core (constraints-newest.txt): the core's own tests, with it in front of the
environment's packages."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.support.overlay import overlay

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^megatron-core==(\S+)$", re.MULTILINE)
UNIT = (
    "arch attention data_datasets merging plan plan_file plan_steps plan_target planning products pruning_model rope "
    "stages distillation_extremes distillation_losses distillation_recomputing importance_aggregation "
    "importance_collectors importance_scores"
)
# All others of tests/distributed/ run. These open checkpoints with NeMo 2.4.1, which imports nothing of parallel_state
# where one of the names that it wants is missing (nemo/lightning/megatron_init.py), and then ends with a NameError.
OF_NEMO = "documents evaluate families padded_vocabulary sessions source_forms streamed_scores"
GONE = "def set_pipeline_model_parallel_split_rank"
# What holds for constraints.txt's version only.
OLDER_ONLY = {
    "tests/unit/test_stages.py::test_tensor_ranks_that_are_refused_are_those_that_megatron_refuses": (
        "0.16 gives copies of a query group to more ranks than there are groups; here these stay refused"
    ),
    "tests/unit/test_planning.py::test_a_layer_keeps_what_autograd_says": (
        "0.16 keeps a value more of the MLP's width (x + glu_linear_offset); recipes/plan_run.py counts those of 0.13"
    ),
}


def chosen() -> list[str]:
    """The files of tests, by their paths from the root."""
    distributed = {path.stem.removeprefix("test_") for path in (ROOT / "tests/distributed").glob("test_*.py")}
    assert distributed >= set(OF_NEMO.split())
    found = [f"tests/unit/test_{name}.py" for name in UNIT.split()]
    return found + [
        f"tests/distributed/test_{name}.py" for name in sorted(distributed - set(OF_NEMO.split()))
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_core_s_own_tests(tmp_path: Path) -> None:
    (version,) = PIN.findall((ROOT / "constraints-newest.txt").read_text())
    place = overlay(ROOT / "supply_chain" / "hashes-newest.txt")
    assert GONE not in (place / "megatron/core/parallel_state.py").read_text(), "run OF_NEMO too"
    report = tmp_path / "report.xml"
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "tests.support.which_megatron"]
    left_out = [f"--deselect={test}" for test in OLDER_ONLY]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *left_out, f"--junitxml={report}", *chosen()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert [suite.get(name) for name in ("failures", "errors", "skipped")] == ["0", "0", "0"]
    assert int(suite.get("tests", 0)) > 950  # 1014 at 0.16.1
    for where in ("here", "on a rank"):
        assert f"megatron-core {where}: {version} {place / 'megatron/core/__init__.py'}" in done.stdout
