"""What a pipeline's last steps would refuse is refused before its first."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_minitron.config.pipeline import PipelineRecipe
from nemo_minitron.config.recipes import parse
from nemo_minitron.errors import InputError
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.workflows.pipeline.check import check
from nemo_minitron.workflows.pipeline.foresight import check_ahead
from nemo_minitron.workflows.pipeline.steps import steps_of
from tests.unit.test_pipeline import preset

CONF = Path(__file__).resolve().parents[2] / "conf"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "teacher", "llama", "license: mit")


def written(place: Path, family: str, card: str) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**SIZES, "model_type": family}))
    (place / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    return place


def ahead(source: Path, changes: dict[str, dict[str, Any]], *, packages: bool = False) -> None:
    """Of the demo's pipeline, with more settings of its steps."""
    listed = preset()
    for name, more in changes.items():
        listed[name].set |= more
    steps = steps_of(listed, str(source), source.parent / "run", [])
    composed = []
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for step in steps:
            register_resolvers(step.recipe)
            config = compose(step.recipe, list(step.overrides))
            composed.append({"config": OmegaConf.to_container(config, resolve=True)})
    check_ahead(steps, composed, source, packages=packages)


def test_what_can_be_made_is_accepted(source: Path) -> None:
    ahead(source, {}, packages=True)


def test_a_missing_licence_is_asked_for_once(tmp_path: Path) -> None:
    source = written(tmp_path / "teacher", "llama", "tags: []")
    with pytest.raises(InputError) as refused:
        ahead(source, {})
    asked = "pipeline.steps.export.set.license, pipeline.steps.gguf.set.license: nothing in "
    assert str(refused.value).startswith(f"{asked}{source} says")
    ahead(source, {"export": {"license": "mit"}, "gguf": {"license": "none"}})
    with pytest.raises(InputError, match=r"^pipeline\.steps\.gguf\.set\.license: nothing in"):
        ahead(source, {"export": {"license": "mit"}})


def test_a_licence_without_derivatives_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "teacher", "llama", "license: cc-by-nd-4.0")
    with pytest.raises(InputError, match=r"^pipeline\.steps\.export: license=cc-by-nd-4\.0, by .* forbids"):
        ahead(source, {})


def test_a_name_on_the_hub_that_the_licence_forbids(tmp_path: Path) -> None:
    source = written(tmp_path / "teacher", "llama", "license: llama3.1")
    with pytest.raises(InputError, match=r"^pipeline\.steps\.export: publish=me/small: .* begins with Llama"):
        ahead(source, {"export": {"publish": "me/small"}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prune": {"hidden_size": 4096}}, r"prune\.hidden_size=4096"),
        ({"trainer": {"tensor_model_parallel_size": 4}}, "num_query_groups=2: leaves 2 of 4 tensor-parallel"),
    ],
)
def test_a_shape_that_cannot_be_made(settings: dict[str, Any], said: str, source: Path) -> None:
    with pytest.raises(InputError, match=rf"^pipeline\.steps\.prune: .*{said}"):
        ahead(source, {"prune": settings})


def test_a_student_that_llama_cpp_does_not_open(tmp_path: Path) -> None:
    """Its Qwen2 has heads of hidden_size / heads (src/models/qwen2.cpp): not after a pruning of channels alone."""
    source = written(tmp_path / "teacher", "qwen2", "license: apache-2.0")
    with pytest.raises(
        InputError, match=r"^pipeline\.steps\.gguf: .*llama\.cpp opens a qwen2 model only where"
    ):
        ahead(source, {})
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 1}
    ahead(source, {"prune": {"prune": sizes}})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no such directory"),
        ({**SIZES, "model_type": "mamba"}, "model_type 'mamba' is not converted"),
        ({**SIZES, "model_type": "llama"}, r"model\.safetensors is missing"),
    ],
)
def test_a_source_that_is_none(config: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    source = tmp_path / "teacher"
    if config is not None:
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        register_resolvers("pipeline")
        typed = ["pipeline=minitron_width", f"source={source}", f"run_dir={tmp_path / 'run'}"]
        recipe = parse(PipelineRecipe, compose("pipeline", typed))
    with pytest.raises(InputError, match=rf"^source={re.escape(str(source))}: .*{said}"):
        check(recipe)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(InputError, match=rf"^source={re.escape(str(file))}: a damaged GGUF file"):
        ahead(file, {})


def test_a_package_that_is_missing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_minitron.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^pipeline\.steps\.gguf: format=gguf: needs the package gguf"):
        ahead(source, {}, packages=True)
    ahead(source, {})
