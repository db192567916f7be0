"""Every command of README.md and docs/ is composed, parsed and looked up, in one process; a new kind of one fails here.

Run for real elsewhere, as README's first screen shows them: `make demo` and `make test` by `.ci/run`, with set-up from
nothing in functional/test_setup.py; `+conf=width` in functional/test_prune*.py. Launchers' commands of
docs/clusters.md: functional/test_launcher_slurm.py, test_launcher_local.py, test_docker.py, test_slurm.py.
"""

import importlib
import math
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_minitron.config.recipes import parse
from nemo_minitron.errors import InputError
from nemo_minitron.run import overrides
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.run.registry import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "assets" / "demo-teacher" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# What is not composed, by its beginning, and why.
NOT_COMPOSED = {
    'python -c "import nemo_minitron"': "a measurement of importing; test_packaging imports it",
    "python -m tests.support.kill_trials": "hours; functional/test_random_kills.py does few of its trials",
    "launchers/docker.sh build": "needs a Docker engine; tests/image_campaign.py builds it by buildah",
    "launchers/slurm_on_loopback.py": "needs root; functional/test_slurm.py runs the block as it stands",
    "pip install": "the network",
    "ollama create": "needs Ollama",
}
# What stands for a value that only the reader has; other capital words are taken as paths.
STANDS_FOR = {"S": "1", "N": "1", "nemo.sqsh": "nvcr.io#nvidia/nemo:25.07"}
# Options of Hydra that only show something, and how many words each is.
SHOWS = {"--help": 1, "--cfg": 2, "--package": 2}
# Groups of one file, of which nothing need be listed; presets are in a sentence.
SINGLE = ("conf", "eval", "export", "model", "search", "synthesize", "trainer")
BEGINS = re.compile(r"(python|launchers/\S+|make|pip|ollama|eval|time) ")


@dataclass(frozen=True)
class Command:
    """As it stands on a page, without comments and broken lines."""

    page: str
    text: str

    def words(self) -> list[str]:
        """Without variables, `time` and an `eval "$(...)"` around it; `...` and [options] are left out."""
        inner = re.sub(r'^eval "\$\((.*)\)"$', r"\1", self.text)
        words = [word for word in shlex.split(inner) if word not in ("...", "time")]
        while re.match(r"[A-Z_]+=", words[0]) or words[0] == "taskset":
            del words[: 3 if words[0] == "taskset" else 1]
        return [word for word in words if not re.fullmatch(r"\[.*\]", word)]


def commands_of(page: Path) -> Iterator[Command]:
    """Those in blocks without a language, indented ones, and those between backticks."""
    name, text = str(page.relative_to(ROOT)), page.read_text()
    blocks = re.findall(r"^```(?:|sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^    (\S.*)$", prose, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            yield from (Command(name, found) for found in _of_line(line))
    for quoted in re.findall(r"`([^`\n]+(?:\n[^`\n]+)*)`", prose):
        flat = " ".join(quoted.split())
        if BEGINS.match(f"{flat} ") and len(flat.split()) > 1:
            yield Command(name, flat)


def _of_line(line: str) -> list[str]:
    bare = re.sub(r"(^|\s)#.*$", "", line).strip()
    bare = re.sub(r"^[A-Z]=\$\((.*)\)$", r"\1", bare)
    return [bare] if bare and re.match(r"[A-Z_]+=\S* |" + BEGINS.pattern, f"{bare} ") else []


# Each text once, at the first page that has it.
COMMANDS = list({command.text: command for page in reversed(PAGES) for command in commands_of(page)}.values())


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        yield


def compose_and_parse(
    recipe: str, typed: list[str], monkeypatch: pytest.MonkeyPatch, ranks: int | None
) -> None:
    """As the recipe does with what was typed; each of a sweep. `ranks`: None is as many as the layout asks for."""
    module, _, name = RECIPES[recipe].partition(":")
    schema: Any = getattr(importlib.import_module(f"nemo_minitron.config.{module}"), name)
    register_resolvers(recipe, schema)
    given = overrides.for_hydra(recipe, schema, typed, compose=False)
    keys = [word for word in given if word not in overrides.SWEEP and not word.startswith("hydra.")]
    for batch in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(keys), None):
        for job in batch:
            config = overrides.with_home(compose(recipe, overrides=["run_dir=run", *job]))
            layout = math.prod(v for k, v in config.trainer.items() if str(k).endswith("_parallel_size"))
            monkeypatch.setenv("NEMO_MINITRON_NPROC", str(ranks or layout))
            parse(schema, config)


def recipes_in(words: list[str]) -> Iterator[tuple[str, list[str], int | None]]:
    """(recipe, what is typed after it, ranks) of each recipe that a command runs."""
    nproc = words[words.index("--nproc") + 1] if "--nproc" in words else ""
    free = words[0].startswith("launchers/slurm") or any("+cluster=" in word for word in words)
    ranks = None if free or (nproc and not nproc.isdigit()) else int(nproc or 1)
    before: list[str] = ["-m"] if "-m" in words[: _first(words)] and words[:2] != ["python", "-m"] else []
    rest = words[_first(words) :]
    while rest:
        end = rest.index("--then") if "--then" in rest else len(rest)
        recipe = re.sub(r"recipes/(\w+)\.py", r"\1", rest[0])
        after = rest[1:end]
        options = {i + after_it for i, word in enumerate(after) for after_it in range(SHOWS.get(word, 0))}
        typed = [_stands_for(word) for i, word in enumerate(after) if i not in options]
        if words[0] == "launchers/slurm.sh" and not any(word.startswith("+cluster=") for word in typed):
            typed.append("+cluster=slurm")  # as the launcher does
        yield recipe, before + typed, ranks
        rest = rest[end + 1 :]


def _first(words: list[str]) -> int:
    if words[:3] == ["python", "-m", "nemo_minitron"]:
        return 3
    return next((i for i, word in enumerate(words) if word.startswith("recipes/")), len(words))


def _stands_for(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}{equals}{STANDS_FOR.get(value, value)}"


def check_script(path: str, options: list[str]) -> None:
    """A benchmark or launcher is there, and its options stand in it or in what benchmarks share."""
    shared = ("models.py", "kd_loss.py", "memory.py") if path.startswith("benchmarks/") else ()
    text = "".join(
        file.read_text() for file in [ROOT / path, *(ROOT / "benchmarks" / name for name in shared)]
    )
    for option in options:
        if option.startswith("--") and option != "--help":
            name = option[2:].replace("-", "[-_]")
            assert re.search(rf"""["-]{name}["']|\b{name}\b(=|:)""", text), (path, option)


def kind_of(command: Command) -> str:
    words = command.words()
    if any(" ".join(words).startswith(" ".join(shlex.split(start))) for start in NOT_COMPOSED):
        return "listed"
    if words[0] == "make":
        return "make"
    if list(recipes_in(words)):
        return "recipe"
    return "script" if words[0] in ("python", "launchers/local.sh") else "unknown"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text}"[:110])
def test_a_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words, kind = command.words(), kind_of(command)
    assert kind != "unknown", f"{command}: compose it here, or name it in NOT_COMPOSED with the reason"
    if kind == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        assert named
        assert set(named) <= set(targets)
    elif kind == "recipe":
        for recipe, typed, ranks in recipes_in(words):
            assert (ROOT / "recipes" / f"{recipe}.py").is_file()
            try:
                compose_and_parse(recipe, typed, monkeypatch, ranks)
            except InputError as error:  # `...` stands for what a reader has read above
                if "..." not in command.text or "missing" not in str(error):
                    raise
    elif kind == "script":
        script = words[0] if words[0] != "python" else words[1]
        if words[1:2] == ["-m"]:
            script = words[2].replace(".", "/") + ".py"
        check_script(script.replace(".sh", ".py"), words[1:])


def configuration_page() -> ModuleType:
    spec = spec_from_file_location("configuration_page", ROOT / "scripts" / "configuration_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_keys_is_what_the_schemas_say() -> None:
    script = configuration_page()
    page = script.PAGE.read_text()
    assert page == script.whole(page), (
        "run `python scripts/configuration_page.py` and commit docs/configuration.md"
    )
    assert script.unexplained() == [], "of these keys the docstring of their schema says nothing"
    for file in sorted((ROOT / "conf").glob("*/*.yaml")):
        assert (
            f"`{file.parent.name}={file.stem}`" in page or file.parent.name in SINGLE or file.stem == "none"
        ), file


def test_the_readme_s_script_is_the_example_s() -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 15
    assert textwrap.indent(block, "    ") in (ROOT / "examples" / "plain_nemo.py").read_text()


def test_nothing_is_listed_that_the_pages_do_not_have() -> None:
    texts = [" ".join(command.words()) for command in COMMANDS]
    for start in NOT_COMPOSED:
        assert any(text.startswith(" ".join(shlex.split(start))) for text in texts), start


def test_the_pages_commands_are_found() -> None:
    kinds = [kind_of(command) for command in COMMANDS]
    assert kinds.count("recipe") > 80
    assert {"make", "recipe", "script", "listed"} == set(kinds)


@pytest.mark.parametrize(
    "text",
    [
        "python recipes/prune.py +conf=narrow",
        "python recipes/prune.py prune.hiden_size=3/4",
        "python recipes/sft.py prune=width",
    ],
)
def test_a_wrong_command_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((recipe, typed, ranks),) = recipes_in(Command("x.md", text).words())
    with pytest.raises(Exception, match="narrow|hiden_size|no use for prune") as caught:
        compose_and_parse(recipe, typed, monkeypatch, ranks)
    assert not isinstance(caught.value, InputError) or "prune" in str(caught.value)


LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_somewhere(page: Path) -> None:
    """Files, and headings by GitHub's anchors."""
    for path, anchor in LINK.findall(page.read_text()):
        if path.startswith(("http://", "https://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor[1:] in anchors, (path, anchor)


NAMED = [ROOT / "docs" / "architecture.md", ROOT / "docs" / "extending.md", ROOT / "tests" / "README.md"]
PACKAGE = ROOT / "nemo_minitron"
ROOMS = (PACKAGE, PACKAGE / "distillation", PACKAGE / "workflows" / "prune")
PLACES = (ROOT, *ROOMS, ROOT / "tests", ROOT / "tests" / "distributed")


@pytest.mark.parametrize("page", NAMED, ids=lambda p: p.name)
def test_the_files_of_the_builders_pages_are_there(page: Path) -> None:
    """What stands between backticks and looks like a path, with * and NAME for any."""
    for name in re.findall(r"`([\w*./-]+(?:/|\.py|\.yaml)[\w*./-]*)`", page.read_text()):
        made_by_runs = name in ("resolved.yaml",) or "..." in name
        pattern = re.sub(r"NAME|GROUP", "*", name).rstrip("/")
        found = [place for place in PLACES for end in ("", ".py") if any(place.glob(pattern + end))]
        found += list(ROOT.glob(f"conf/**/{pattern}"))
        assert found or made_by_runs, name
