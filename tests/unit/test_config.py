"""Configurations: each preset composes with each recipe, schemas and files agree, `parse` refuses with one line."""

import ast
import contextlib
import dataclasses
import importlib
import math
import re
import shlex
import typing
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.logger import LoggerConfig, check_logger
from nemo_minitron.config.recipes import CommonConfig, PretrainRecipe, PruneRecipe, parse
from nemo_minitron.errors import InputError
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.run.registry import RECIPES

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
COMMON = CONF / "common.yaml"


def schema_of(recipe: Path) -> type[CommonConfig]:
    """The dataclass that recipes/X.py names in `commands.RECIPES`, or hands to `recipe.main` itself."""
    tree = ast.parse(recipe.read_text())
    if recipe.stem in RECIPES:
        assert f'main("{recipe.stem}")' in recipe.read_text()
        module, _, schema = RECIPES[recipe.stem].partition(":")
        return getattr(importlib.import_module(f"nemo_minitron.config.{module}"), schema)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "recipe.main"]
    (call,) = calls
    primary, schema = call.args[:2]
    assert isinstance(primary, ast.Constant)
    assert primary.value == recipe.stem
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    (module,) = [n.module for n in imports if schema.id in {a.name for a in n.names}]  # type: ignore[attr-defined]
    return getattr(importlib.import_module(str(module)), schema.id)  # type: ignore[attr-defined]


SCHEMAS = {path.stem: schema_of(path) for path in sorted((ROOT / "recipes").glob("*.py"))}
FILES = sorted(path for path in CONF.rglob("*.yaml") if path != COMMON)
GROUPS = sorted({str(path.parent.relative_to(CONF)) for path in FILES if path.parent != CONF})
PRESETS = [str(p.relative_to(CONF / "conf").with_suffix("")) for p in FILES if CONF / "conf" in p.parents]


def name_of(file: Path) -> str:
    return str(file.relative_to(CONF))


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def composed(recipe: str, *overrides: str) -> DictConfig:
    register_resolvers(recipe)
    return compose(recipe, overrides=[*overrides, "run_dir=run"])


def parsed(recipe: str, config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As the launcher's ranks would, as many as the layout asks for."""
    ranks = math.prod(v for k, v in config.trainer.items() if str(k).endswith("_parallel_size"))
    monkeypatch.setenv("NEMO_MINITRON_NPROC", str(ranks))
    return parse(SCHEMAS[recipe], config)


# ---- files ---------------------------------------------------------------------------------------------------


def test_each_recipe_has_its_primary() -> None:
    assert {path.stem for path in FILES if path.parent == CONF} == set(SCHEMAS)
    assert {"prune", "pretrain"} <= set(SCHEMAS)
    assert {"width", "depth", "demo_teacher"} <= set(PRESETS)


@pytest.mark.parametrize("recipe", SCHEMAS)
def test_a_primary_lists_every_group_and_holds_every_key(recipe: str) -> None:
    """An override in a preset fails where the primary does not list the group, and a sweep where it lacks the key."""
    primary = OmegaConf.load(CONF / f"{recipe}.yaml")
    listed = {str(name) for entry in primary.defaults if isinstance(entry, DictConfig) for name in entry}
    # Presets and clusters are added with a plus sign.
    added = {group for group in GROUPS if group.split("/")[0] in ("conf", "cluster")}
    assert listed == set(GROUPS) - added
    assert "common" in primary.defaults
    assert set(composed(recipe)) == {field.name for field in dataclasses.fields(SCHEMAS[recipe])}


def schemas_of_groups() -> dict[str, type]:
    found: dict[str, type] = {}
    for schema in SCHEMAS.values():
        for name, annotation in typing.get_type_hints(schema).items():
            if name in GROUPS and dataclasses.is_dataclass(annotation):
                assert isinstance(annotation, type)
                assert found.setdefault(name, annotation) is annotation, name
    return found


CHOICES = [
    (group, file.stem)
    for group in schemas_of_groups()
    for file in sorted((CONF / group).glob("*.yaml"))
    if file.stem != "none"
]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_group_s_files_hold_exactly_the_keys_of_its_schema(group: str, choice: str) -> None:
    schema = schemas_of_groups()[group]
    keys = set(composed("prune", f"{group}={choice}")[group])
    assert keys == {field.name for field in dataclasses.fields(schema)}


def test_the_schemas_of_the_groups_are_known() -> None:
    assert {"prune", "trainer", "data", "eval", "model"} <= set(schemas_of_groups())
    assert len(CHOICES) >= 8


@pytest.mark.parametrize("file", [f for f in FILES if f.stem == "none"], ids=name_of)
def test_nothing_is_in_none(file: Path) -> None:
    assert OmegaConf.load(file) == {}


# ---- headers -------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"# (?:python|launchers/\S+(?: --\S+ \S+)*) recipes/(\w+)\.py ?(.*?)(?:: .*)?$")


def header(file: Path) -> tuple[str, list[str]]:
    """The recipe and the overrides of the command in a file's first comment."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    found = COMMAND.match(lines[0])
    assert found, f"{name_of(file)} does not begin with the command that runs it: {lines[0]}"
    return found[1], shlex.split(found[2])


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_begins_with_a_command_that_uses_it(file: Path) -> None:
    recipe, overrides = header(file)
    config = compose(recipe, overrides=overrides, return_hydra_config=True)
    if file.parent == CONF:
        assert recipe == file.stem
        return
    chosen = config.hydra.runtime.choices
    relative = file.relative_to(CONF).with_suffix("").parts
    # conf/conf/a/b.yaml is chosen as +conf=a/b or as +conf/a=b.
    ways = {"/".join(relative[:i]): "/".join(relative[i:]) for i in range(1, len(relative))}
    assert any(chosen.get(group) == name for group, name in ways.items()), chosen


# ---- presets -------------------------------------------------------------------------------------------------


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, value in node.items() for k, v in leaves(value, f"{prefix}.{name}").items()}


def lacks_a_value(recipe: str, config: DictConfig) -> bool:
    """Whether a key without default has no value; a key that the schema does not know raises."""
    given = OmegaConf.create({k: v for k, v in config.items() if v is not None})
    merged = OmegaConf.merge(OmegaConf.structured(SCHEMAS[recipe]), given)
    return bool(OmegaConf.missing_keys(merged))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", SCHEMAS)
def test_a_preset_composes_with_a_recipe(recipe: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the recipe has no use for it; what the preset states arrives, and nothing is unknown."""
    config = composed(recipe, f"+conf={preset}")
    stated = OmegaConf.to_container(OmegaConf.load(CONF / "conf" / f"{preset}.yaml"))
    assert isinstance(stated, dict)
    stated.pop("defaults", None)
    stated.pop("hydra", None)
    for name, value in leaves(stated).items():
        if not (isinstance(value, str) and "${" in value):
            assert OmegaConf.select(config, name[1:]) == value, name
    # What only the user knows may be missing, such as where the checkpoint is.
    with contextlib.suppress(InputError) if lacks_a_value(recipe, config) else contextlib.nullcontext():
        parsed(recipe, config, monkeypatch)


@pytest.mark.parametrize("recipe", SCHEMAS)
def test_presets_can_be_swept_with_one_override(recipe: str) -> None:
    """Strict keys: what one preset's composition has, the others' have too."""
    override = "prune.importance=random"
    for preset in ("width", "depth"):
        assert composed(recipe, f"+conf={preset}", override).prune.importance == "random"


def test_the_command_line_beats_a_preset() -> None:
    config = composed("prune", "+conf=width", "prune.hidden_size=7/8", "data=files", "prune=depth")
    assert (config.prune.hidden_size, config.prune.ffn_hidden_size) == ("7/8", "9/14")
    assert config.data.name == "files"


# ---- parse ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "tensor_model_parallel_size=0": ["tensor_model_parallel_size=0", "at least 1"],
    "pipeline_model_parallel_size=-1": ["pipeline_model_parallel_size=-1", "at least 1"],
    "context_parallel_size=0": ["context_parallel_size=0", "at least 1"],
    "data_parallel_size=0": ["data_parallel_size=0", "at least 1"],
    "tensor_model_parallel_size=2": ["1 rank was", "needs 2"],
    "num_nodes=0": ["num_nodes=0", "at least 1"],
    "num_nodes=3": ["num_nodes=3", "ranks, 1"],
    "sequence_parallel=true": ["sequence_parallel=true", "above 1"],
    "precision=16": ["trainer.precision=16", "32, bf16-mixed"],
    "micro_batch_size=0": ["trainer.micro_batch_size=0", "at least 1"],
    "micro_batch_size=-8": ["trainer.micro_batch_size=-8", "at least 1"],
    "global_batch_size=0": ["trainer.global_batch_size=0", "at least 1"],
    "global_batch_size=-8": ["trainer.global_batch_size=-8", "at least 1"],
    "global_batch_size=12": ["global_batch_size=12", "micro_batch_size 8"],
    "max_steps=-1": ["max_steps=-1", "at least 0"],
    "val_check_interval=-1": ["val_check_interval=-1", "at least 0"],
    "limit_val_batches=-1": ["limit_val_batches=-1", "at least 0"],
    "log_every_n_steps=0": ["log_every_n_steps=0", "at least 1"],
}
KEYS = {
    "+trainer.tensor_parallel=2": ["tensor_parallel", "TrainerConfig"],
    "+prune.hidden=2": ["hidden", "PruneConfig"],
    "+sauce=2": ["sauce", "PruneRecipe"],
    "trainer.micro_batch_size=1.5": ["trainer.micro_batch_size", "1.5"],
    "trainer.micro_batch_size=true": ["trainer.micro_batch_size", "True"],
    "trainer.micro_batch_size=null": ["trainer.micro_batch_size", "None"],
    "trainer.sequence_parallel=maybe": ["trainer.sequence_parallel", "maybe"],
    "prune.contiguous=perhaps": ["prune.contiguous", "perhaps"],
    "source=[a]": ["source", "a"],
    "source=null": ["source", "missing"],
    "+data.seq_length.x=3": ["seq_length"],
    "data.seq_length=1": ["data.seq_length=1", "at least 2"],
    "eval.samples=0": ["eval.samples=0", "at least 1"],
    "prune.calibration_samples=0": ["prune.calibration_samples=0", "at least 1"],
    "prune.control_seeds=-1": ["prune.control_seeds=-1", "at least 0"],
    "seed=-1": ["seed=-1", "0"],
    "data.cache_dir=/dev/null/x": ["data.cache_dir=/dev/null/x", "/dev/null is no directory"],
    "prepared={a:1}": ["prepared", "launcher"],
    "seed=4294967296": ["seed=4294967296", "4294967295"],
}


def refusal(config: DictConfig, schema: type = PruneRecipe) -> str:
    with pytest.raises(InputError) as caught:
        parse(schema, config)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("override", LAYOUTS)
def test_an_impossible_layout_is_refused(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_NPROC", "1")
    message = refusal(composed("prune", "+conf=width", f"trainer.{override}"))
    for part in LAYOUTS[override]:
        assert part in message


def test_sequence_parallel_ranks_share_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_NPROC", "2")
    both = ["trainer.tensor_model_parallel_size=2", "trainer.sequence_parallel=true"]
    message = refusal(composed("prune", "data.seq_length=511", *both))
    assert "data.seq_length=511" in message
    assert "2" in message
    assert parse(PruneRecipe, composed("prune", "data.seq_length=512", *both)).trainer.ranks == 2


@pytest.mark.parametrize("override", KEYS)
def test_a_bad_key_or_value_is_refused(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_NPROC", "1")
    if override.startswith("+data.seq_length"):
        config = composed("prune")
        OmegaConf.set_struct(config, False)
        config.data.seq_length = {"x": 3}
    else:
        config = composed("prune", "+conf=width", override)
    message = refusal(config)
    for part in KEYS[override]:
        assert part in message


@pytest.mark.parametrize("variable", ["NEMO_MINITRON_NPROC", "WORLD_SIZE"])
def test_ranks_that_the_layout_does_not_use_are_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMO_MINITRON_NPROC", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "4")
    for sizes in ({}, {"tensor_model_parallel_size": 2}, {"data_parallel_size": 3}):
        overrides = [f"trainer.{name}={size}" for name, size in sizes.items()]
        message = refusal(composed("prune", *overrides, "trainer.global_batch_size=24"))
        assert message.startswith("4 ranks were started")
    layout = ["trainer.tensor_model_parallel_size=2", "trainer.pipeline_model_parallel_size=2"]
    assert parse(PruneRecipe, composed("prune", *layout)).trainer.ranks == 4


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is here")
def test_context_parallel_needs_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_NPROC", "2")
    message = refusal(composed("prune", "+conf=width", "trainer.context_parallel_size=2"))
    assert "context_parallel_size=2" in message
    assert "Transformer Engine" in message


def test_a_group_that_was_left_out_gets_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_NPROC", "1")
    recipe = parse(PruneRecipe, composed("prune", "prune=none"))
    assert recipe.prune.calibration_samples == 128
    with pytest.raises(InputError, match="num_layers"):
        parse(PretrainRecipe, composed("pretrain", "model=none"))


def test_a_logger_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(InputError, match=f"logger={name}: the package {name} is not installed; "):
            check_logger(LoggerConfig(name))
    check_logger(LoggerConfig())
