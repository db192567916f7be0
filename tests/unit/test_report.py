"""report.html out of runs whose files are not trusted: read back by Python's own HTML and XML parsers."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from defusedxml import ElementTree

from nemo_minitron.errors import InputError
from nemo_minitron.report.chain import read_chain
from nemo_minitron.report.page import write_page
from tests.support.report_runs import EVIL, hostile_runs, write_run


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.said: list[str] = []
        self.feed(html)
        self.text = "".join(self.said)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    return hostile_runs(tmp_path)


def test_a_chain_is_followed_backwards_and_shown(runs: dict[str, Path]) -> None:
    chain = read_chain(runs["measured"])
    assert [run.directory.name for run in chain.runs] == ["pruned", "learned", "tuned"]
    assert [run.directory.name for run in chain.measured] == ["measured"]
    page = Page(write_page(chain, [{"prompt": "P", "teacher": "said by the teacher"}], ["teacher"]))
    for part in (
        "3M parameters became 2M (67%)",
        "2.500 → 3.750",
        "3.750 → 2.750",
        "ffn_hidden_size: 75% of 32 kept",
    ):
        assert part in page.text, part
    for part in (
        "not pruned: hidden_size",
        "teacher 2.500",
        "0.250 ± 0.030",
        "(at chance)",
        "12.5",
        "A8 <img",
    ):
        assert part in page.text, part
    for part in ("python recipes/prune.py", "python recipes/evaluate.py", "said by the teacher", "torch 2."):
        assert part in page.text, part
    # The KL is the loss here: drawn once. One chart an axis and a metric, the unpruned one folded.
    assert page.tags.count("svg") == 2 + 3


def test_nothing_of_a_file_is_executed_and_nothing_is_fetched(runs: dict[str, Path]) -> None:
    html = write_page(read_chain(runs["measured"]), [{"prompt": EVIL, "teacher": EVIL}], ["teacher"])
    page = Page(html)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.text.count(EVIL) >= 8  # shown as text, unchanged
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name.endswith(("href", "src")):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)  # well-formed, without entities
        assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", svg), "a colour without its variable"


def test_what_is_damaged_is_said_or_left_out(runs: dict[str, Path], tmp_path: Path) -> None:
    (runs["pruned"] / "scores.safetensors").write_bytes(b"\xff" * 100)
    (runs["learned"] / "config.yaml").write_bytes(b"\xff\xfe")
    odd = {
        "recipe": ["x"],
        "source": 5,
        "params": 10**400,
        "wall_s": True,
        "scores": 7,
        "kept": [1],
        "peak_rss_gib": "x",
    }
    strange = write_run(tmp_path, "strange", odd)
    page = Page(write_page(read_chain(runs["tuned"], [strange]), [], []))
    assert "scores file" in page.text
    Page(write_page(read_chain(strange), [], []))
    for nothing in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=f"source={re.escape(str(nothing))}: no finished run"):
            read_chain(nothing)
    with pytest.raises(InputError, match="report.runs="):
        read_chain(runs["tuned"], [tmp_path])
