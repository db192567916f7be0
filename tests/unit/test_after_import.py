"""`cpu_compat.after_import`: what is changed in a module once it has run."""

import types
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.cpu_compat import after_import


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
