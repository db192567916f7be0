"""recipes/report.py as a user types it, and its page in a real browser."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.functional.conftest import Teacher
from tests.support.browser import Browser
from tests.support.commands import Commands, tree
from tests.support.report_runs import EVIL, hostile_runs


def test_a_page_is_made_without_nemo_and_refused_in_a_line(commands: Commands) -> None:
    home = commands.home / "report"
    home.mkdir()
    runs = hostile_runs(home)
    asked = {
        "made": [f"source={runs['measured']}"],
        "no run": [f"source={home}"],
        "few prompts": [f"source={runs['tuned']}", "report.samples=2", "report.prompts=[a]"],
        "beside": [f"source={runs['tuned']}", f"report.runs=[{home}]"],
    }
    got = commands.ask(
        [{"recipe": "report", "overrides": [*o, f"run_dir={home / n}"], "env": {}} for n, o in asked.items()]
    )
    made, *refused = got
    assert (made["code"], made["nemo"]) == (0, False), made
    page = (home / "made" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert EVIL not in page
    for name, end, part in zip(
        [n for n in asked if n != "made"],
        refused,
        [f"source={home}", "report.samples=2", "report.runs="],
        strict=True,
    ):
        assert end["code"] == 2, (name, end)
        assert part in end["err"], end
        assert not tree(home / name), name


@pytest.mark.slow
def test_models_answer_where_that_is_asked_for(commands: Commands, teacher: Teacher) -> None:
    """The run's own model, in a process of its own: the tiny teacher says something to each prompt."""
    run_dir = commands.home / "report-samples"
    ended = commands.run(
        "report",
        f"source={teacher.run_dir}",
        "report.samples=2",
        "report.max_new_tokens=4",
        f"run_dir={run_dir}",
    )
    assert ended.result()["report"] == str(run_dir / "report.html")
    page = (run_dir / "report.html").read_text()
    assert page.count("<h4>after pretrain</h4>") == 2


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    """No word on the console, nothing asked for outside, the script works; light, dark, a phone and paper differ."""
    from nemo_minitron.report.chain import read_chain
    from nemo_minitron.report.page import write_page

    browser = Browser(tmp_path)
    page = tmp_path / "report.html"
    page.write_text(write_page(read_chain(hostile_runs(tmp_path)["measured"]), [], []))
    dom, console = browser.run(page, "--dump-dom")
    assert console == ""
    assert dom.count('class="zoom"') == dom.count('class="frame zooms"') > 2
    assert "evil.test" not in browser.asked_for(page)
    looks = {
        "light": ["--window-size=1100,900"],
        "dark": ["--window-size=1100,900", "--blink-settings=preferredColorScheme=0"],
        "phone": ["--window-size=500,900"],
    }
    lightness = {}
    for name, options in looks.items():
        _, console = browser.run(page, f"--screenshot={tmp_path / name}.png", *options)
        assert console == ""
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert pixels.std() > 8, "something is drawn"
        lightness[name] = float(np.median(pixels))
    assert lightness["light"] > 220
    assert lightness["phone"] > 220
    assert lightness["dark"] < 60
    browser.run(page, f"--print-to-pdf={tmp_path / 'paper.pdf'}")
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
    # What would go wrong is seen: an error on the console, a request.
    page.write_text('<script>console.error("seen")</script><img src="http://evil.test/x.png">')
    assert "seen" in browser.run(page, "--dump-dom")[1]
    assert "evil.test" in browser.asked_for(page)
