"""What a user types is what the recipe gets: quoting for Hydra, the home directory, keys that mean nothing."""

import os
import pwd
from collections.abc import Callable

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_minitron.config.align import SftRecipe
from nemo_minitron.config.recipes import (
    CommonConfig,
    DistillRecipe,
    PretrainRecipe,
    PruneRecipe,
    SearchRecipe,
)
from nemo_minitron.errors import InputError
from nemo_minitron.run.overrides import for_hydra, for_parser, text_keys, used_groups, with_home
from nemo_minitron.run.overrides import given as is_given

PARSER = OverridesParser.create()
# What is Hydra's own: quoted text, interpolations, null and the mark of a missing value.
SYNTAX = st.sampled_from(["null", "???", "'a b'", '"a"', "${seed}", "x${seed}"])


def value(override: str) -> object:
    """What Hydra makes of an override."""
    return PARSER.parse_override(override).value()


def is_syntax(text: str) -> bool:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text in ("null", "???") or "${" in text or quoted


@settings(max_examples=30)  # Hydra's parser takes its time
@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not is_syntax(text)))
@example("~/models/x")
@example("/models/été modèle=2 #3, [a] {b} (c) it's \"so\" \\' \\\\ $x %y:z")
@example("a b=c")
@example("ends with \\")
@example("'one")
@example("5")
@example("true")
@example("1e3")
@example(" padded ")
@example("[a]")
@example("NULL")
def test_text_arrives_as_typed(typed: str) -> None:
    assert value(for_parser(f"source={typed}", text=True, sweep=False)) == typed


@settings(max_examples=20)
@given(SYNTAX)
def test_hydra_s_own_syntax_stays(typed: str) -> None:
    for text in (True, False):
        for sweep in (True, False):
            assert for_parser(f"source={typed}", text=text, sweep=sweep) == f"source={typed}"


@pytest.mark.parametrize("typed", ["3", "3/4", "[3,5]", "{a: 1}", "1e-3", "true", "late", "-1", "", "a\\,b"])
def test_other_values_are_hydra_s_where_it_can_read_them(typed: str) -> None:
    assert for_parser(f"prune.hidden_size={typed}", text=False, sweep=False) == f"prune.hidden_size={typed}"


@pytest.mark.parametrize(
    ("typed", "arrives"),
    [
        ("~/x/*.txt", "~/x/*.txt"),
        ("/été/a=b c#1.txt", "/été/a=b c#1.txt"),
        ("[~/a.txt,/été/b=1.txt]", ["~/a.txt", "/été/b=1.txt"]),
        ("['a,b',é]", None),  # a quoted comma: left to Hydra, which says what it does not like
    ],
)
def test_what_hydra_cannot_read_is_taken_as_typed(typed: str, arrives: object) -> None:
    made = for_parser(f"data.train={typed}", text=False, sweep=False)
    if arrives is not None:
        assert value(made) == arrives


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("prune.hidden_size=3/4,1/2", ["3/4", "1/2"]),
        ("prune.seed=range(1,3)", [1, 2]),
        ("source=~/a=1,/été/b", ["~/a=1", "/été/b"]),
        ("prune.batch_aggregation=choice(l2,mean)", ["l2", "mean"]),
    ],
)
def test_commas_separate_in_a_sweep(override: str, values: list[object]) -> None:
    text = override.startswith(("source", "prune.batch_aggregation"))
    parsed = PARSER.parse_override(for_parser(override, text=text, sweep=True))
    assert parsed.is_sweep_override()
    jobs = [value(f"source={text}") for text in parsed.sweep_iterator(parser_transformer())]
    assert jobs == values


def parser_transformer() -> Callable[[object], str]:
    """How Hydra's sweeper hands a value on to a job."""
    from hydra.core.override_parser.types import Transformer

    return Transformer.encode


def test_a_comma_is_text_without_a_sweep() -> None:
    assert value(for_parser("source=/a,b", text=True, sweep=False)) == "/a,b"


def made(*typed: str, schema: type[CommonConfig] = PruneRecipe, compose: bool = False) -> list[str]:
    return for_hydra("a recipe", schema, typed, compose=compose)


def test_options_are_left_alone() -> None:
    options = ["--config-path", "/runs/lr=0.1 é", "--config-name", "resolved", "hydra.run.dir='/runs/x'"]
    assert made(*options) == options
    assert made("--cfg", "job", "~prune") == ["--cfg", "job", "~prune"]


def test_a_sweep_may_be_asked_for_anywhere() -> None:
    """Hydra's own parser refuses `prune=width -m prune.seed=1,2`."""
    assert made("prune=width", "-m", "prune.seed=1,2") == ["-m", "prune=width", "prune.seed=1,2"]


@pytest.mark.parametrize("override", ["hydra.run.dir=/x", "+hydra.run.dir=/x", "++hydra.run.dir=/x"])
def test_hydra_s_directory_is_refused_by_the_name_to_use(override: str) -> None:
    with pytest.raises(InputError, match=r"^hydra\.run\.dir=/x: .* say run_dir=/x$"):
        made("+conf=width", override)


def test_a_sweep_s_run_dir_is_its_directory() -> None:
    assert made("-m", "run_dir=/été/x", "seed=1,2") == ["-m", "hydra.sweep.dir='/été/x'", "seed=1,2"]
    assert made("-m", "run_dir=/a,/b") == ["-m", "run_dir=/a,/b"]
    assert made("-m", "run_dir=/a", "seed=1,2", compose=True)[1] == "run_dir='/a'"


@pytest.mark.parametrize(
    ("schema", "override", "takes"),
    [
        (DistillRecipe, "source=/m", "student, teacher"),
        (DistillRecipe, "+prune.hidden_size=3", "distill"),
        (DistillRecipe, "optim.lr=1", "distill"),
        (PruneRecipe, "student=/m", "source, prune"),
        (PruneRecipe, "teacher_cache=/m", "source, prune"),
        (PruneRecipe, "search=width", "source, prune"),
        (SftRecipe, "teacher=/m", "student, align"),
        (DistillRecipe, "trainer.max_steps=3", "no use for trainer.max_steps; it takes distill.max_steps$"),
        (SftRecipe, "trainer.val_check_interval=3", "; it takes align.val_check_interval$"),
        (PruneRecipe, "trainer.limit_val_batches=3", "no use for trainer.limit_val_batches$"),
    ],
)
def test_a_key_that_means_nothing_is_refused(schema: type[CommonConfig], override: str, takes: str) -> None:
    with pytest.raises(InputError, match=f"{takes}"):
        made(override, schema=schema)


@pytest.mark.parametrize(
    ("schema", "overrides"),
    [
        (PretrainRecipe, ["optim.lr=1", "model=demo", "export_dir=x", "data=files", "trainer.max_steps=3"]),
        (SearchRecipe, ["search=width", "distill=demo", "prune.batch_aggregation=l2", "source=x"]),
        (
            DistillRecipe,
            ["+conf=width", "teacher_cache=x", "sdg=y", "+cluster=slurm", "seed=3", "hydra.verbose=true"],
        ),
        (
            PruneRecipe,
            ["+sauce=2", "+trainer.no_such=3", "eval.samples=null"],
        ),  # the schema refuses what is unknown
    ],
)
def test_a_key_that_is_used_is_not(schema: type[CommonConfig], overrides: list[str]) -> None:
    assert len(made(*overrides, schema=schema)) == len(overrides)


def test_which_keys_hold_text() -> None:
    keys = text_keys(PruneRecipe)
    assert {"run_dir", "source", "data.tokenizer", "data.path", "prune.scores", "prune.task_file"} <= keys
    assert keys.isdisjoint({"data.train", "seed", "prune.hidden_size", "prune", "trainer.max_steps"})
    assert used_groups(SearchRecipe) == ["source", "prune", "search", "distill"]


def test_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/é")
    user = pwd.getpwuid(os.getuid())
    config = OmegaConf.create(
        {
            "source": "~/m",
            "n": 3,
            "data": {"train": ["~", "a~/b", f"~{user.pw_name}/x"], "valid": "~nobody-of-that-name/x"},
        }
    )
    assert with_home(config) == {
        "source": "/home/é/m",
        "n": 3,
        "data": {"train": ["/home/é", "a~/b", f"{user.pw_dir}/x"], "valid": "~nobody-of-that-name/x"},
    }


def test_whether_a_key_was_given() -> None:
    assert is_given(["+conf=width", "run_dir=x"], "run_dir")
    assert not is_given(["run_directory=x", "--cfg", "job"], "run_dir")
