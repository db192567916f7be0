"""Pipelines as command lines: references between steps, what is refused, and what a step's key is made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_minitron.config.pipeline import PipelineRecipe, StepConfig
from nemo_minitron.config.recipes import parse
from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.workflows.pipeline.foresight import check_packages
from nemo_minitron.workflows.pipeline.state import FILE, State
from nemo_minitron.workflows.pipeline.steps import Step, content_of, key_of, steps_of
from tests.unit.test_docs import compose_and_parse

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("/runs/x")


def preset(name: str = "width") -> dict[str, StepConfig]:
    loaded = OmegaConf.load(ROOT / "conf" / "pipeline" / f"minitron_{name}.yaml")
    return {
        step: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StepConfig), settings))  # type: ignore[misc]
        for step, settings in loaded.steps.items()
    }


PIPELINES = sorted(p.stem for p in (ROOT / "conf" / "pipeline").glob("*.yaml") if p.stem != "none")


def test_every_step_of_every_pipeline_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its recipe would, and parses: presets, groups, keys, ranges, layouts. What is typed twice is tried once."""
    typed: dict[tuple[str, tuple[str, ...]], None] = {}
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        register_resolvers("pipeline")
        for name in PIPELINES:
            config = compose("pipeline", [f"pipeline={name}", "run_dir=run"])
            steps = parse(PipelineRecipe, config).pipeline.steps
            assert {"prune", "distill", "report"} <= set(steps), name
            typed |= {(step.recipe, step.overrides): None for step in steps_of(steps, "/t", RUN, [])}
        for recipe, overrides in typed:
            compose_and_parse(recipe, [*overrides], monkeypatch, None)
    assert len(typed) > 25


@pytest.mark.parametrize("axis", ["width", "depth"])
def test_the_papers_pipelines_keep_none_of_the_demos_lengths(axis: str) -> None:
    """They inherit its steps. 94B tokens are 9,961 steps of 1,152 x 8,192 (arXiv 2408.11796)."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        register_resolvers("pipeline")
        demo, papers = (
            compose("pipeline", [f"pipeline={name}_{axis}", "run_dir=run"]).pipeline.steps
            for name in ("minitron", "llama31_8b")
        )
    for step in ("correct", "distill"):
        assert papers[step].set.distill.max_steps == 9961
    shortened = {name for name in demo if OmegaConf.select(demo[name].set, "align.max_steps")}
    assert shortened
    assert all(papers[name].set.align.max_steps > 2 * demo[name].set.align.max_steps for name in shortened)


def made(steps: dict[str, StepConfig], *shared: str) -> dict[str, Step]:
    return {step.name: step for step in steps_of(steps, "/t", RUN, list(shared))}


def test_each_step_reads_what_the_one_before_made() -> None:
    steps = made(preset(), "data=files", "data.train=x")
    assert steps["distill"].overrides == (
        *("data=files", "data.train=x", "+conf=width"),
        *("student=/runs/x/prune", "teacher=/runs/x/correct"),
        *("distill.max_steps=150", "run_dir=/runs/x/distill"),
    )
    assert {name: step.needs for name, step in steps.items()} == {
        "correct": (),
        "prune": ("correct",),
        "distill": ("prune", "correct"),
        "sft": ("distill",),
        "preference": ("sft",),
        **dict.fromkeys(("answers", "evaluate", "export", "gguf"), ("preference",)),
        "device": ("export", "gguf"),
        "report": ("preference", "answers", "evaluate"),
    }


def test_a_step_that_is_off_is_passed_over() -> None:
    steps = preset("depth")
    for name in ("correct", "sft", "preference", "answers"):
        steps[name].on = False
    found = made(steps)
    assert list(found) == ["prune", "distill", "evaluate", "export", "gguf", "device", "report"]
    assert "source=/t" in found["prune"].overrides
    assert found["export"].needs == ("distill",)
    assert "report.runs=[/runs/x/evaluate]" in found["report"].overrides


def test_values_are_typed_as_a_user_would() -> None:
    settings = {"a": {"b": None, "c": True}, "d": [1, "x"], "e": "@source/weights", "f": 0.5}
    (step,) = made({"one": StepConfig("prune", choose={"prune": "depth"}, set=settings)}).values()
    assert step.overrides[:-1] == ("prune=depth", "a.b=null", "a.c=true", "d=[1,x]", "e=/t/weights", "f=0.5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": {"student": "@sft"}}, "pipeline.steps.distill.set.student=@sft: sft is off before it"),
        ({"distill": {"student": "@nobody"}}, "there is no step nobody"),
        ({"distill": {"student": "@prune|source"}}, "@STEP, @source or @STEP|@OTHER is legal"),
        ({"a/../b": {"x": 1}}, "is no name for a step"),
        ({"source": {"x": 1}}, "is no name for a step"),
        (None, "nothing is on"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, Any] | None, said: str) -> None:
    steps = preset() if change else {}
    for name, settings in (change or {}).items():
        steps.setdefault(name, StepConfig("prune")).set |= settings
    with pytest.raises(InputError, match=said.replace("|", r"\|").replace(".", r"\.")):
        made(steps)


def test_a_key_is_of_settings_files_source_and_earlier_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    step = Step("distill", "distill", (), tmp_path / "run" / "distill", ("prune",))
    config = {"data": {"train": f"{tmp_path}/*.txt", "cache_dir": str(tmp_path)}, "run_dir": "r", "seed": 1}

    def key(source: str = "s", before: str = "p", at: str = "/t", of: Step = step, **more: Any) -> str:
        def content(path: Path) -> str | None:
            return source if path == Path(at) else content_of(path)

        return key_of(of, config | {"source": at} | more, Path(at), {"prune": before}, content)

    first = key()
    assert key(run_dir="elsewhere", overwrite=True) == key(at="/moved/t") == first
    moved = Step("distill", "distill", (), tmp_path / "moved" / "distill", ("prune",))
    keys = {s: key(of=s, student=f"{s.directory.parent}/prune") for s in (step, moved)}
    assert keys[step] == keys[moved] != first
    assert len({first, key(seed=2), key(source="other"), key(before="other")}) == 4
    monkeypatch.chdir(tmp_path)
    here = key(data={"train": "a.txt"})  # as one types it in the directory of the file
    text.write_text("two")
    assert key() != first
    assert key(data={"train": "a.txt"}) != here


def test_a_step_that_needs_what_is_off_is_refused() -> None:
    """The comparison of two exports, without one of them."""
    for name, taken in (("export", "source=@export/huggingface"), ("gguf", "instruct.gguf=@gguf/gguf")):
        steps = preset()
        steps[name].on = False
        with pytest.raises(InputError, match=f"pipeline.steps.device.set.{taken}: {name} is off before it"):
            made(steps)


def test_what_was_made_of_something_else_goes(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.begin("prune", "k1", "source")
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / RESULT).write_text("{}")
    state.end("prune", "prune: done", 2.0)
    again = State(tmp_path)
    assert again.is_done("prune", "k1")
    assert not again.is_done("prune", "k2")
    again.check_source("/t", "source", overwrite=False)
    with pytest.raises(InputError, match="source=/t: is not what prune in"):
        again.check_source("/t", "other", overwrite=False)
    again.check_source("/t", "other", overwrite=True)
    again.begin("prune", "k1", "source")  # killed and started again: it stays
    assert (tmp_path / "prune").exists()
    again.begin("prune", "k2", "source")
    assert not (tmp_path / "prune").exists()
    assert "seconds" not in json.loads((tmp_path / FILE).read_text())["steps"]["prune"]


def test_one_directory_has_one_pipeline(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.begin("prune", "k1", "source", "minitron_width")
    again = State(tmp_path)
    again.check_pipeline("minitron_depth", overwrite=False)  # nothing is finished yet
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / RESULT).write_text("{}")
    with pytest.raises(
        InputError, match=r"pipeline=minitron_depth: .* has prune of pipeline=minitron_width; choose"
    ):
        again.check_pipeline("minitron_depth", overwrite=False)
    for name, overwrite in (("minitron_depth", True), ("minitron_width", False), (None, False)):
        again.check_pipeline(name, overwrite=overwrite)


@pytest.mark.parametrize("text", ["", "[]", '{"steps": 3}', "{"])
def test_a_damaged_record_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    assert not State(tmp_path).is_done("prune", "k")


def test_llama_cpp_is_missed_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Step(name, "evaluate_instruct", (), RUN, ()) for name in ("answers", "device")]
    composed: list[dict[str, Any]] = [{"instruct": {"gguf": gguf}} for gguf in (None, "RUN/gguf")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_packages([steps[0], Step("prune", "prune", (), RUN, ())], [composed[0], {"instruct": None}])
    with pytest.raises(InputError, match=r"pipeline\.steps\.device: needs the package xllamacpp"):
        check_packages(steps, composed)
