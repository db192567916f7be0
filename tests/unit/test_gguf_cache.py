"""Where the Hugging Face form of a GGUF file is kept, for every recipe that takes one."""

import contextlib
import importlib
import io
import os
import subprocess
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from hydra import compose, initialize_config_dir

from nemo_minitron.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from nemo_minitron.config.recipes import parse
from nemo_minitron.errors import InputError
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.run.registry import RECIPES
from tests.support import gguf_files
from tests.unit.test_config import CONF, SCHEMAS

# What each needs to come to its checkpoint; a refusal right after it ends the check.
TAKES: dict[str, list[str]] = {
    "prune": ["+conf=width", "source={}"],
    "search": ["source={}", "search.budget.parameters=1/2"],
    "distill": ["student={}", "teacher={}"],
    "cache_teacher": ["teacher={}"],
    "correct_teacher": ["teacher={}"],
    "synthesize": ["teacher={}"],
    "sft": ["student={}"],
    "preference": ["student={}", "align.train=x", "align.valid=y"],
    "evaluate": ["source={}"],
    "compare": ["models=[{}]"],
    "evaluate_instruct": ["source={}", "instruct.file=/nowhere"],
    "export": ["source={}", "to={}", "license=none"],
    "merge": ["models=[{},/nowhere]"],
    "evolve": ["models=[{},/nowhere]", "merge=linear"],
}
LONGER = 2 * gguf_files.CONTEXT


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gguf")
    tokenizer = gguf_files.byte_level(gguf_files.TEXT, 340, PRE_TOKENIZERS[0].rules())
    model = gguf_files.make_model("llama", tokenizer.get_vocab_size())
    return gguf_files.write_gguf(
        home / "toy.gguf", model, Kind.F32, gguf_files.gpt2_vocabulary(tokenizer, "gpt-2")
    )


def test_every_recipe_with_a_checkpoint_is_tried() -> None:
    # llama.cpp reads the file itself where one talks to it; a report opens runs; a pipeline's steps open what it takes;
    # a plan reads headers.
    assert set(TAKES) == set(RECIPES) - {
        "pretrain",
        "instruct_data",
        "chat",
        "report",
        "pipeline",
        "plan_run",
    }


@pytest.mark.parametrize("recipe", TAKES)
def test_the_conversion_goes_where_data_cache_dir_says(
    recipe: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_MINITRON_HOME", str(tmp_path / "home"))
    work = importlib.import_module(f"nemo_minitron.workflows.{recipe}.check")
    asked = [setting.format(file) for setting in TAKES[recipe]]
    asked += [
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.seq_length={LONGER}",
        f"run_dir={tmp_path / 'run'}",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        register_resolvers(recipe)
        config = parse(SCHEMAS[recipe], compose(recipe, overrides=asked))
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(InputError):
        work.check(config)
    (made,) = (tmp_path / "cache" / "gguf").glob("*")
    assert (made / "config.json").is_file()
    assert not (tmp_path / "home").exists()


def test_clean_cache_removes_conversions_and_nothing_else(tmp_path: Path) -> None:
    for part in ("checkpoints", "exports", "gguf", "models", "data", "envs"):
        (tmp_path / part / "kept").mkdir(parents=True)
    environment = {**os.environ, "NEMO_MINITRON_HOME": str(tmp_path)}
    subprocess.run(["make", "-s", "clean-cache"], cwd=CONF.parent, env=environment, check=True, timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "envs", "models"]
