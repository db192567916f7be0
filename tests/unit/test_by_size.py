"""Learning rates and warm-up that go by size: the demo's stay, the published ones are reached, what is given wins."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.by_size import RULES, keep, settle
from nemo_minitron.config.recipes import (
    CorrectTeacherRecipe,
    DistillRecipe,
    OptimConfig,
    PretrainRecipe,
    parse,
)
from nemo_minitron.errors import InputError
from nemo_minitron.run.main import register_resolvers

CONF = Path(__file__).resolve().parents[2] / "conf"
DEMO, STUDENT = 3_640_512, 2_067_984  # parameters of the demo teacher and of its student by +conf=width


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def composed(recipe: str, typed: list[str]) -> DictConfig:
    register_resolvers(recipe)
    return compose(recipe, overrides=typed)


def chosen(table: str, parameters: int, steps: int, **given: float) -> OptimConfig:
    open_ = {"lr": None, "min_lr": None, "warmup_steps": None, "by_size": table}
    o = OptimConfig(**{**open_, **given})  # type: ignore[arg-type]
    settle(o, "distill.optim", parameters, steps)
    return o


# Recipe, preset, and what the preset's file said when it held numbers: README's figures are of them.
@pytest.mark.parametrize(
    ("recipe", "typed", "lr", "min_lr", "warmup"),
    [
        *(
            ("distill", [f"distill={name}"], 1e-3, 1e-4, 20)
            for name in ("demo_intermediate", "sdg", "sdg_mixed", "instruct_mixed")
        ),
        ("distill", ["+conf=width"], 1e-3, 1e-4, 20),
        ("distill", ["+conf=depth"], 1e-3, 1e-4, 20),
        ("distill", ["distill=minitron"], 1e-4, 1e-5, 40),
        ("correct_teacher", [], 6e-4, 6e-5, 20),
        ("correct_teacher", ["distill=correction_minitron"], 6e-5, 6e-6, 120),
        ("sft", ["+conf=instruct"], 1e-3, 1e-4, 20),
        ("sft", ["align=lora"], 1e-2, 1e-3, 20),
        ("preference", ["align=rpo"], 1e-4, 1e-5, 20),
        ("distill", ["distill=demo", "distill.optim.lr=2e-4"], 2e-4, 1e-4, 20),
        ("distill", ["distill=demo", "distill.optim.warmup_steps=3"], 1e-3, 1e-4, 3),
    ],
)
def test_the_demo_s_presets_are_what_they_were(
    recipe: str, typed: list[str], lr: float, min_lr: float, warmup: int
) -> None:
    config = composed(recipe, typed)
    group = "align" if recipe in ("sft", "preference") else "distill"
    for parameters in (STUDENT, DEMO):
        for steps in (100, 300, 1900):
            o = OptimConfig(**OmegaConf.to_container(config[group].optim))  # type: ignore[arg-type]
            settle(o, f"{group}.optim", parameters, steps)
            assert (o.lr, o.min_lr, o.warmup_steps) == (lr, min_lr, warmup)


# arXiv 2408.11796: the student of 4.51B at 1e-4 to 1e-5 after 40 steps, the teacher of 8.03B at 3e-4 / 5 after 120.
@pytest.mark.parametrize(
    ("table", "parameters", "rate", "warmup"),
    [("distill", 4_510_000_000, 1e-4, 40), ("correction", 8_030_000_000, 6e-5, 120)],
)
def test_the_papers_sizes_learn_as_published(table: str, parameters: int, rate: float, warmup: int) -> None:
    o = chosen(table, parameters, 9961)
    assert (o.lr, o.min_lr, o.warmup_steps) == (rate, pytest.approx(rate / 10), warmup)


@pytest.mark.parametrize("table", RULES)
def test_a_short_training_reaches_its_learning_rate(table: str) -> None:
    """What is chosen leaves four fifths of the steps; what is given stays."""
    assert [chosen(table, STUDENT, steps).warmup_steps for steps in (1, 4, 12, 20, 99)] == [1, 1, 2, 4, 19]
    assert chosen(table, STUDENT, 4, warmup_steps=20).warmup_steps == 20


@pytest.mark.parametrize("table", RULES)
def test_larger_models_learn_more_slowly(table: str) -> None:
    sizes = [2e6, 4.1e6, 3e7, 8.14e7, 1.345e8, 3.6e8, 1.2e9, 4.51e9, 8e9, 7e10]
    rates = [chosen(table, int(size), 1000).lr for size in sizes]
    assert rates == sorted(rates, reverse=True)  # type: ignore[type-var]
    assert len(set(rates)) > 6


def test_between_two_sizes_the_logarithms_lie_on_a_line() -> None:
    """sqrt(3.64M x 8.03B) = 170.97M lies halfway, so its rate is sqrt(6e-4 x 6e-5) = 1.9e-4."""
    assert chosen("correction", 170_970_000, 100).lr == 1.9e-4


def test_what_is_given_wins() -> None:
    o = chosen("sft", 81_400_000, 160, lr=3e-4)
    assert (o.lr, o.min_lr, o.warmup_steps) == (3e-4, 3e-5, 16)
    o = chosen("sft", 81_400_000, 160, min_lr=0.0, warmup_steps=0)
    assert (o.min_lr, o.warmup_steps) == (0.0, 0)
    whole = OptimConfig()
    assert settle(whole, "distill.optim", 81_400_000, 160) is None
    assert whole == OptimConfig()


def test_what_is_chosen_is_said_and_kept() -> None:
    typed = ["student=S", "distill.optim.warmup_steps=5", "distill.max_steps=160", "run_dir=R"]
    config = composed("distill", typed)
    recipe = parse(DistillRecipe, config)
    said = settle(recipe.distill.optim, "distill.optim", 4_510_000_000, 160)
    assert said == (
        "distill.optim.lr=0.0001, distill.optim.min_lr=1e-05: by the size of what learns, 4,510.0M parameters"
    )
    keep(config, recipe)
    kept = config.distill.optim
    assert (kept.lr, kept.min_lr, kept.warmup_steps) == (1e-4, 1e-5, 5)
    assert parse(DistillRecipe, config).distill == recipe.distill


def test_what_is_open_needs_a_table() -> None:
    with pytest.raises(
        InputError, match=r"distill.optim.lr=0.0004, distill.optim.min_lr=0.1: the second must be"
    ):
        chosen("correction", 30_000_000, 160, lr=4e-4, min_lr=0.1)
    with pytest.raises(
        InputError, match=r"^distill.optim.lr=null: must be a number where distill.optim.by_size=null"
    ):
        settle(OptimConfig(lr=None), "distill.optim", 1, 1)
    for schema, recipe, key, value, said in (
        (PretrainRecipe, "pretrain", "optim.lr", "null", "optim.lr=null: must be a number"),
        (PretrainRecipe, "pretrain", "optim.by_size", "sft", "optim.by_size=sft: pretraining has no table"),
        (
            CorrectTeacherRecipe,
            "correct_teacher",
            "distill.optim.by_size",
            "demo",
            "distill.optim.by_size=demo",
        ),
    ):
        config = composed(recipe, [f"{key}={value}", "run_dir=R"])
        with pytest.raises(InputError, match=said):
            parse(schema, config)
