"""The study's rows and tables: every run composes, every claim names arms, and error bars decide."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir

from benchmarks.study import __main__ as driver
from benchmarks.study import rows, table
from benchmarks.study.home import Home
from benchmarks.study.rows import ROOT, Claim, Row, Run, Study
from benchmarks.study.table import Arm
from nemo_minitron.errors import InputError
from tests.unit.test_docs import compose_and_parse

STUDIES = {"demo": rows.demo(100), "real": rows.real("FILE", 100)}
CLAIM = Claim("a", "b", "")


def finished(home: Home, name: str, seed: int, **fields: Any) -> None:
    """What a run leaves behind."""
    run = home.study.runs[name]
    place = home.directory(run, seed)
    place.mkdir(parents=True)
    made_of = [run.recipe, *home.typed(run, seed), f"teacher {home.teacher_sha256}"]
    record = {"made_of": made_of, "cpu_s": 90.0, "wall_s": 100.0}
    place.with_name(f"{name}.json").write_text(json.dumps(record))
    (place / "result.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_run_composes_after_those_that_it_needs(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = Home(tmp_path, study, "")
    made = [run.name for run, _ in home.wanted(study.rows, [2])]
    assert set(made) == set(study.runs)
    assert len(made) == len(study.runs)
    for number, name in enumerate(made):
        assert set(study.runs[name].needs) <= set(made[:number])
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        for run in study.runs.values():
            _, recipe, *typed, place = home.command(run, 2)
            assert Path(recipe).is_file()
            assert place == f"run_dir={tmp_path}/{study.name}/seed-2/{run.name}"
            assert not any("=@" in text for text in typed)
            compose_and_parse(run.recipe, typed, monkeypatch, None)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_arms_train_on_equally_many_tokens(study: Study) -> None:
    for row in study.rows:
        for name in (n for claim in row.claims for n in (claim.better, claim.worse)):
            assert name in row.arms
        for last in row.arms.values():
            steps = [run.trained_steps for run in study.chain(last) if run.recipe == "distill"]
            assert sum(steps) == 100, last


def test_the_real_model_s_arms_have_100k_tokens() -> None:
    study = rows.real("FILE", 200)
    assert study.batch * study.length * 200 >= 100_000
    (batch,) = {t for run in study.runs.values() for t in run.overrides if "global_batch_size" in t}
    assert batch == f"distill.global_batch_size={study.batch}"


# By hand: deviations from 7/3 are -4/3, -1/3 and 5/3, their squares add up to 14/3, so the variance is 7/3 and that of
# the mean 7/9. Of 1.0 and 1.2: mean 1.1, variance 0.02, of the mean 0.01, so the bar reaches from 0.9 to 1.3.
def test_the_mean_and_its_standard_error() -> None:
    arm = Arm((1.0, 2.0, 4.0))
    assert arm.mean == pytest.approx(2.3333333)
    assert arm.standard_error == pytest.approx(0.8819171)
    assert arm.bar == pytest.approx(1.7638342)
    assert Arm((1.0, 1.2)).bar == pytest.approx(0.2)
    assert table.shown(Arm((1.0, 1.2))) == "1.100 ± 0.200"
    assert table.shown(Arm((1.25,))) == "1.250"


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((1.0, 1.2), (1.45, 1.65), "held: 1.100 ± 0.200, 1.550 ± 0.200"),
        ((1.45, 1.65), (1.0, 1.2), "not held: 1.550 ± 0.200, 1.100 ± 0.200"),
        (
            (1.0, 1.2),
            (1.35, 1.55),
            "not decided, the error bars overlap: 1.100 ± 0.200, 1.450 ± 0.200",
        ),
        ((1.35, 1.55), (1.0, 1.2), "not decided, the error bars overlap"),
        ((1.0,), (2.0, 2.1), "not decided: fewer than two seeds of a"),
        ((), (2.0,), "not decided: fewer than two seeds of a and of b"),
    ],
)
def test_error_bars_decide(a: tuple[float, ...], b: tuple[float, ...], said: str) -> None:
    assert table.verdict(CLAIM, {"a": Arm(a), "b": Arm(b)}).startswith(said)


def test_tables_are_of_what_is_done(tmp_path: Path) -> None:
    home, seeds = Home(tmp_path, STUDIES["demo"], "1f"), range(1, 4)
    losses: Mapping[str, tuple[float, float]] = {"kd": (3.0, 3.2), "block_kd": (3.5, 3.7)}
    for seed, teacher in ((1, 2.8), (2, 3.0)):
        finished(home, "width", seed, lm_loss_nats_before=teacher)
        for name, values in losses.items():
            finished(home, name, seed, lm_loss_nats_after=values[seed - 1])
    left = dict.fromkeys((row.name for row in home.study.rows), 0.5)
    driver.write(home, seeds, left)
    page = (tmp_path / "demo" / "study.md").read_text()
    assert "| width | 0.200 ± 0.000 | 2 | 1.5 |" in page
    assert "| depth, by block, with states | not run | 0 |  |" in page
    said = "held: 0.200 ± 0.000, 0.700 ± 0.000"
    assert (
        f"| width below depth, by block | width before depth up to 15B (best practice 4) | {said} |" in page
    )
    assert "about 0.5 h are left (`--only shape`)" in page
    lines = list(driver.listing(home, home.study.rows, seeds, left))
    assert lines[1].startswith("shape: 4 of 9 arms done, 0.15 CPU h; about 0.50 CPU h left")
    assert (tmp_path / "demo" / "study.png").stat().st_size > 5000


def test_finished_runs_are_kept_and_others_are_refused(tmp_path: Path) -> None:
    study = STUDIES["demo"]
    home, run = Home(tmp_path, study, "1f"), study.runs["kd"]
    finished(home, "kd", 1, lm_loss_nats_after=3.0)
    assert home.carry_out(run, 1) == {"lm_loss_nats_after": 3.0}
    assert home.result(run, 2) is None
    longer = rows.demo(200)
    with pytest.raises(InputError, match=r"seed-1/kd was made with distill.max_steps=100 .*another --home"):
        Home(tmp_path, longer, "1f").result(longer.runs["kd"], 1)
    with pytest.raises(InputError, match="was made with teacher 1f;"):
        Home(tmp_path, study, "2e").result(run, 1)
    home.directory(run, 1).with_name("kd.json").unlink()
    with pytest.raises(InputError, match="seed-1/kd was made by no study"):
        home.result(run, 1)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_run_that_fails_stops_only_those_that_need_it(
    at_once: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        Run("bad", "prune", ("+conf=width", "source=/nowhere")),
        Run("kd", "distill", ("student=@bad", "distill.max_steps=2")),
    ]
    row = Row("one", "?", {"a": "kd"}, ())
    home = Home(tmp_path, Study("demo", "", (), {r.name: r for r in runs}, (row,), 8, 256, "bad"), "")
    assert driver.carry_out(home, [row], [1], at_once) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert re.search(r"^1/2 demo seed 1 bad: failed: exit code 2, see .*seed-1/bad.log", first)
    assert "source=/nowhere" in (tmp_path / "demo" / "seed-1" / "bad.log").read_text().splitlines()[-1]
    assert second == "2/2 demo seed 1 kd: failed: not begun, bad is not there"
    assert home.record(runs[0], 1)["cpu_s"] > 0


def test_runs_at_once_wait_for_those_that_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, done, at_work = STUDIES["real"], [], []
    home = Home(tmp_path, study, "")

    def started(run: Run, seed: int) -> tuple[int, float]:
        assert {(name, seed) for name in run.needs} <= set(done)
        at_work.append(len(done))
        time.sleep(0.02)
        place = home.directory(run, seed)
        place.mkdir(parents=True)
        (place / "result.json").write_text('{"lm_loss_nats_before": 1.0, "lm_loss_nats_after": 2.0}')
        done.append((run.name, seed))
        return 0, 1.0

    monkeypatch.setattr(home, "_started", started)
    assert driver.carry_out(home, study.rows, [1, 2], at_once=4) == 0
    assert len(done) == 2 * len(study.runs)
    assert {name for name, _ in done[:4]} == {"width", "depth"}
    assert len(set(at_work)) < len(at_work)  # several had begun before the next one ended


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--only", "origin,colour"], "--only colour: must be among origin, shape"),
        (["--real", "/nowhere/m.gguf"], "--real /nowhere/m.gguf: is no checkpoint and no file"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--steps", "1"], "--steps 1: must be at least 2"),
        (["--at-once", "0"], "--at-once 0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    typed: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["study", "--home", str(tmp_path / "home"), *typed])
    assert driver.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not (tmp_path / "home").exists()
