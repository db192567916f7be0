"""`cpu_compat.after_import`: what is changed in a module once it has run."""

import multiprocessing
import os
import queue
import types
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.cpu_compat import after_import
from nemo_minitron.cpu_compat.write_results import WriteResults


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("given", ["path", "trainer"])
def test_modelopt_is_asked_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_run: bool, has_state: bool, given: str
) -> None:
    """Restoring: of a process in which it ran, and of a checkpoint that it wrote. Saving: of the former."""
    asked: list[Any] = []
    module = types.ModuleType("model_utils")
    module.restore_modelopt_state = lambda model, path, trainer: asked.append(("restore", model, str(path)))  # type: ignore[attr-defined]
    module.save_modelopt_state = lambda model, path, io: asked.append(("save", model, str(path)))  # type: ignore[attr-defined]
    monkeypatch.setattr(after_import, "modelopt_has_run", lambda: has_run)
    monkeypatch.setattr(
        after_import, "has_modelopt_state", lambda path: Path(path, "modelopt_state").exists()
    )
    if has_state:
        (tmp_path / "modelopt_state").mkdir()
    after_import.only_converted_models_need_modelopt(module)

    settings = types.SimpleNamespace(restore_config=types.SimpleNamespace(path=tmp_path))
    trainer = types.SimpleNamespace(strategy=settings, ckpt_path=None)
    module.restore_modelopt_state("m", *((tmp_path,) if given == "path" else (None, trainer)))
    module.save_modelopt_state("m", tmp_path, None)
    restored = [("restore", "m", str(tmp_path))] if has_run or has_state else []
    assert asked == restored + ([("save", "m", str(tmp_path))] if has_run else [])


def _puts(results: WriteResults, values: list[Any]) -> None:
    for value in values:
        results.put(value)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_saver_s_results_are_taken_after_its_end(how: str) -> None:
    """Of any size: more than a pipe holds, which a saver that is only joined would wait for."""
    values: list[Any] = [{0: ["first"]}, {1: "x" * 300_000}, RuntimeError("disk full")]
    results = WriteResults()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    saver = multiprocessing.get_context(how).Process(target=_puts, args=(results, values))
    saver.start()
    saver.join(60)
    assert saver.exitcode == 0
    assert [results.get_nowait(), results.get_nowait()] == values[:2]
    assert str(results.get_nowait()) == "disk full"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_a_result_that_was_cut_short_is_none() -> None:
    results = WriteResults()
    results.put("x" * 1000)
    os.truncate(results._descriptor, 500)
    with pytest.raises(queue.Empty):
        results.get_nowait()
