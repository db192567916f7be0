"""Plans as files: they come back as they were, and nothing that is no plan is taken for one."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import PrunePlan, make_plan

SOURCE = Architecture(4, 8, 6, 6, 2, 4, 16)
TARGET = SOURCE.replace(
    num_layers=2, hidden_size=4, ffn_hidden_size=3, num_attention_heads=2, num_query_groups=1
)


@pytest.fixture(scope="module")
def made() -> PrunePlan:
    return make_plan(SOURCE, TARGET, importance="random", seed=5, source_sha256="f" * 64, head_residual=True)


@pytest.fixture
def written(made: PrunePlan, tmp_path: Path) -> Path:
    made.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_comes_back_as_it_was(made: PrunePlan, written: Path) -> None:
    assert PrunePlan.load(written) == made
    values = json.loads(written.read_text())
    assert list(values) == ["version", "source_sha256", "source", "target", "scores", "kept", "head_residual"]
    assert values["target"] == TARGET.to_dict()
    assert len(values["kept"]["ffn_hidden_size"]) == 2


@pytest.mark.parametrize(
    "more", [{"model_type": "llama"}, {"rope_scaling_factor": 8.0, "rotary_base": 5e5}], ids=str
)
def test_what_not_every_architecture_has_comes_back_too(more: dict[str, Any], tmp_path: Path) -> None:
    source, target = SOURCE.replace(**more), TARGET.replace(**more)
    plan = make_plan(source, target, importance="random", source_sha256="")
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan


def test_saving_replaces_the_whole_file_and_leaves_nothing_else(made: PrunePlan, written: Path) -> None:
    written.write_text("x" * 100_000)
    made.save(written)
    assert PrunePlan.load(written) == made
    assert os.listdir(written.parent) == ["plan.json"]


def test_a_failed_save_leaves_the_old_file(
    made: PrunePlan, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = written.read_text()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        made.save(written)
    assert written.read_text() == before
    assert os.listdir(written.parent) == ["plan.json"]


def put(*path: Any) -> Callable[[dict], None]:
    """Sets the value at the path's end: put("kept", "layers", 3)."""

    def change(values: Any) -> None:
        for step in path[:-2]:
            values = values[step]
        values[path[-2]] = path[-1]

    return change


def drop(*path: Any) -> Callable[[dict], None]:
    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        del values[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("kept"), r"the plan: key 'kept' is missing"),
        (drop("kept", "layers"), r"kept: key 'layers' is missing"),
        (drop("source", "hidden_size"), r"source: architecture: .*hidden_size"),
        (put("extra", 1), r"the plan: unknown key 'extra'"),
        (put("kept", "heads", []), r"kept: unknown key 'heads'"),
        (put("version", 2), r"version: 2, this release reads 1"),
        (put("version", True), r"version: True"),
        (put("source_sha256", 5), r"source_sha256: 5 is no string"),
        (put("scores", []), r"scores: must be an object"),
        (put("kept", []), r"kept: must be an object"),
        (put("target", "hidden_size", 16), r"hidden_size=16: larger than the source's 8"),
        (put("target", "hidden_size", "4"), r"target: hidden_size='4'"),
        (put("target", "kv_channels", 2), r"kv_channels=2: pruning keeps the source's 4"),
        (
            put("source", "gated_linear_unit", "false"),
            r"source: gated_linear_unit='false': must be true or false",
        ),
        (put("source", "model_type", 3), r"source.model_type: 3 is of the wrong type"),
        (
            put("source", "layernorm_epsilon", True),
            r"source: layernorm_epsilon=True: must be a positive, finite number",
        ),
        (put("source", None), r"source: must be an object"),
        (put("kept", "hidden_size", None), r"kept.hidden_size: null leaves the axis alone, but .* 4 of 8"),
        (put("kept", "hidden_size", [0, 1, 2]), r"kept.hidden_size: must list the 4 indices .* lists 3"),
        (put("kept", "hidden_size", [0, 1, 2, 8]), r"kept.hidden_size: 8 is no index of the source's 8"),
        (put("kept", "hidden_size", [-1, 1, 2, 3]), r"kept.hidden_size: -1 is no index"),
        (put("kept", "hidden_size", [0, 1, 2, 2]), r"kept.hidden_size: 2 after 2, indices must ascend"),
        (put("kept", "hidden_size", [0, 2, 1, 3]), r"kept.hidden_size: 1 after 2"),
        (put("kept", "hidden_size", [False, True, 2, 3]), r"kept.hidden_size: False is no index"),
        (put("kept", "hidden_size", [0.0, 1, 2, 3]), r"kept.hidden_size: 0.0 is no index"),
        (put("kept", "hidden_size", "0123"), r"kept.hidden_size: must list the 4 indices"),
        (put("kept", "layers", 2), r"kept.layers: must list the 2 indices"),
        (put("kept", "ffn_hidden_size", [[0, 1, 2]]), r"one list for each of the 2 kept layers, holds 1"),
        (put("kept", "ffn_hidden_size", 1, [0, 1, 6]), r"kept.ffn_hidden_size\[1\]: 6 is no index"),
        (put("kept", "ffn_hidden_size", {}), r"kept.ffn_hidden_size: must hold one list"),
        (put("kept", "num_attention_heads", 0, [0, 3]), r"kept.num_attention_heads\[0\]: every kept query"),
        (put("head_residual", {}), r"head_residual: must hold one list"),
        (put("head_residual", 0, 7), r"head_residual\[0\]: must be a list of pairs"),
        (put("head_residual", 0, [[0, 1, 2]]), r"head_residual\[0\]: \[0, 1, 2\] is no pair"),
    ],
)
def test_what_is_no_plan_is_refused_with_file_and_key(written: Path, change: Any, message: str) -> None:
    values = json.loads(written.read_text())
    change(values)
    written.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as caught:
        PrunePlan.load(written)
    assert str(caught.value).startswith(f"{written}: ")
    assert "\n" not in str(caught.value)


def test_residual_pairs_must_fit_the_kept_heads(made: PrunePlan, written: Path) -> None:
    assert made.kept.num_attention_heads is not None
    kept = made.kept.num_attention_heads[0]
    gone = next(h for h in range(6) if h not in kept and h // 3 == kept[0] // 3)
    elsewhere = next(h for h in range(6) if h // 3 != kept[0] // 3)
    for pairs, message in (
        ([[gone, kept[0]]], "is no kept head"),
        ([[kept[0], elsewhere]], "is no pruned head of the group"),
        ([[kept[0], kept[1]]], "is no pruned head of the group"),
        ([[kept[0], gone]] * 2, "is there twice"),
    ):
        values = made.to_dict()
        values["head_residual"][0] = pairs
        written.write_text(json.dumps(values))
        with pytest.raises(InputError, match=message):
            PrunePlan.load(written)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"version": NaN}', b"[" * 100_000, b"9" * 5000],
    ids=lambda text: repr(text[:12]),
)
def test_files_that_are_no_json_plan_are_refused(written: Path, text: bytes) -> None:
    written.write_bytes(text)
    with pytest.raises(InputError, match="plan.json: "):
        PrunePlan.load(written)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json: cannot be read \(No such file"):
        PrunePlan.load(tmp_path / "none.json")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, made: PrunePlan
) -> None:
    """Whatever one value is replaced by: an InputError, or a plan that is consistent all the same."""
    values: Any = copy.deepcopy(made.to_dict())
    place = values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JUNK)
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(values))
    message, loaded = "", None
    try:
        loaded = PrunePlan.load(path)
    except InputError as error:
        message = str(error)
    if loaded is None:
        assert message.startswith(str(path))
        assert "\n" not in message
    else:
        assert json.loads(json.dumps(loaded.to_dict())) == values
