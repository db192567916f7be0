"""report.html: one file that loads nothing. What comes from a run's files is escaped, and nothing of it is executed."""

import base64
import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.errors import InputError
from nemo_minitron.importance.pictures import axes_of, kept_share, metrics_of
from nemo_minitron.importance.scores import Scores
from nemo_minitron.pruning.plan import PrunePlan
from nemo_minitron.report import charts, look, tables
from nemo_minitron.report.chain import Chain, Run, answers
from nemo_minitron.report.markup import Markup, folded, join, table, tag, text
from nemo_minitron.wording import count

# Nothing is fetched and one script runs, even if a file's text should find a way into the page.
_OWN = base64.b64encode(hashlib.sha256(look.SCRIPT.encode()).digest()).decode()
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_OWN}'"
_PACKAGES = (
    "nemo_minitron",
    "torch",
    "megatron-core",
    "nemo_toolkit",
    "nemo-aligner",
    "transformers",
    "numpy",
)


def write_page(chain: Chain, said: Sequence[Mapping[str, str]], titles: Sequence[str]) -> str:
    """The whole page.

    Args:
        chain: of `read_chain`.
        said: what models said when the page was made: a prompt, and an answer by title.
        titles: of the answers, in their order.
    """
    name = chain.runs[-1].directory.name if chain.runs else chain.measured[-1].directory.name
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", f"{name}: report"),
        tag("style", Markup(look.STYLE)),
    ]
    sections = [
        _summary(chain, name),
        tables.before_after(chain.runs),
        tables.evaluations(chain.measured),
        *(_importance(run) for run in chain.runs),
        *(_training(run) for run in chain.runs),
        _samples(chain.runs, said, titles),
        _commands(chain),
        _configuration(chain),
        _environment(chain.runs),
    ]
    body = tag("body", *sections, tag("script", Markup(look.SCRIPT)))
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}{body}</html>\n'


def _summary(chain: Chain, name: str) -> Markup:
    first = (
        tag("b", "base model"),
        tag("span", Path(chain.base).name if chain.base else "trained from scratch"),
    )
    most = max((s for run in chain.runs for s in _sizes(run)), default=1.0)
    boxes = [tag("li", tag("div", *first, class_="box"))] if chain.base else []
    boxes += [tag("li", _box(run, most)) for run in chain.runs]
    parts: list[Any] = [
        tag("h1", name),
        tag("p", _said(chain), class_="soft"),
        tag("ol", *boxes, class_="flow"),
    ]
    if chain.teacher:
        made = ", ".join(f"{run.recipe} ({run.directory.name})" for run in chain.teacher)
        parts.append(tag("p", f"The teacher was made by {made}.", class_="soft"))
    return tag("header", *parts)


def _said(chain: Chain) -> str:
    runs = [run for run in chain.runs if run.number("params_before") or run.number("params")]
    if not runs:
        return "What was measured."
    sizes = [s for run in runs for s in _sizes(run)]
    said = f"{count(sizes[0])} parameters"
    if sizes[-1] != sizes[0]:
        said += f" became {count(sizes[-1])} ({sizes[-1] / sizes[0]:.0%})"
    tokens = sum(run.number("tokens") or run.number("train_tokens") or 0 for run in chain.runs)
    trained = f"; {count(tokens)} training tokens" if tokens else ""
    return f"{said}{trained}; {tables.duration(sum(run.number('wall_s') or 0 for run in chain.runs))} in all."


def _sizes(run: Run) -> list[float]:
    found = [run.number(key) for key in ("params_before", "params_after", "params")]
    return [size for size in found if size is not None and size > 0]


def _box(run: Run, most: float) -> Markup:
    parts: list[Any] = [tag("b", run.recipe), tag("span", run.directory.name)]
    if sizes := _sizes(run):
        share = f"width: {100 * sizes[-1] / most:.1f}%"
        parts.append(tag("div", tag("i", style=share), class_="size"))
        parts.append(tag("span", f"{count(sizes[-1])} parameters"))
    loss = tables.change(run, "lm_loss_nats_before", "lm_loss_nats_after")
    if loss:
        parts.append(tag("span", f"LM loss {loss} nats"))
    return tag("div", *parts, class_="box")


def _importance(run: Run) -> Markup:
    """Heat maps and depth curves of a pruning; axes that were left alone are folded away."""
    if not (run.directory / "scores.safetensors").exists():
        return Markup("")
    try:
        scores = Scores.load(run.directory / "scores.safetensors")
        kept = PrunePlan.load(run.directory / "plan.json").kept
    except InputError as error:
        return tag("section", tag("h2", "Importance"), tag("p", error, class_="soft"))
    pruned, alone = axes_of(scores, kept)
    shown = [
        _figure(charts.depth_chart(scores, m, kept.layers), _depth_said(kept, m)) for m in metrics_of(scores)
    ]
    shown += [
        _figure(charts.units_chart(scores, axis, kept), _axis_said(scores, axis, kept)) for axis in pruned
    ]
    if alone:
        maps = [_figure(charts.units_chart(scores, axis, kept), axis) for axis in alone]
        shown.append(folded(f"not pruned: {', '.join(alone)}", *maps))
    told = (
        f"{scores.samples:,} samples, {scores.tokens:,} tokens; {scores.batch} over samples of {scores.sequence} "
        "over tokens."
    )
    return tag(
        "section", tag("h2", f"Importance: {run.directory.name}"), tag("p", told, class_="soft"), *shown
    )


def _depth_said(kept: Any, metric: str) -> str:
    gone = "" if kept.layers is None else f"; kept layers: {', '.join(map(str, kept.layers))}"
    return f"{metric} of each layer{gone}"


def _axis_said(scores: Scores, axis: str, kept: Any) -> str:
    units = scores.tensors[axis].shape[-1]
    return f"{axis}: {kept_share(scores, axis, kept):.0%} of {units:,} kept, left of the dashed line"


def _figure(svg: str, caption: str) -> Markup:
    return tag("figure", tag("div", Markup(svg), class_="frame zooms"), tag("figcaption", caption))


def _training(run: Run) -> Markup:
    found = charts.training_charts(run)
    if not found:
        return Markup("")
    shown = [_figure(svg, title) for title, svg in found]
    return tag("section", tag("h2", f"Training: {run.recipe} ({run.directory.name})"), *shown)


def _samples(runs: Iterable[Run], said: Sequence[Mapping[str, str]], titles: Sequence[str]) -> Markup:
    shown: list[Markup] = []
    for row in said:
        shown.append(_beside(row["prompt"], [(title, row[title]) for title in titles]))
    for run in runs:
        for row in answers(run):
            columns = [
                ("before", row["before"]),
                (f"after {run.recipe}", row["after"]),
                ("reference", row["reference"]),
            ]
            shown.append(_beside(row["prompt"], columns))
    if not shown:
        return Markup("")
    return tag("section", tag("h2", "Samples"), *shown)


def _beside(prompt: str, columns: Iterable[tuple[str, str]]) -> Markup:
    answered = [
        tag("div", tag("h4", title), tag("div", answer or "\u2013", class_="said"))
        for title, answer in columns
    ]
    return join([tag("pre", prompt), tag("div", *answered, class_="side")])


def _commands(chain: Chain) -> Markup:
    runs = [*chain.teacher, *chain.runs, *chain.measured]
    lines = "\n".join(run.command or f"# {run.recipe}: {run.directory}" for run in runs)
    return tag("section", tag("h2", "Commands"), tag("pre", lines))


def _configuration(chain: Chain) -> Markup:
    runs = [*chain.teacher, *chain.runs, *chain.measured]
    shown = [
        join(
            [
                folded(
                    f"{run.recipe} ({run.directory.name}): configuration",
                    tag("pre", run.configuration or "not kept"),
                ),
                folded(
                    f"{run.recipe} ({run.directory.name}): result.json", tag("pre", tables.plain(run.result))
                ),
            ]
        )
        for run in runs
    ]
    return tag("section", tag("h2", "Configuration"), *shown)


def _environment(runs: Sequence[Run]) -> Markup:
    rows = [[run.directory.name, *tables.resources(run)] for run in runs]
    versions = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    where = f"Python {platform.python_version()} on {platform.machine()}"
    machine = f"This page was made with {where}: nemo_minitron {__version__}, {versions}."
    return tag(
        "section",
        tag("h2", "Environment"),
        table(["run", "time", "peak memory", "ranks", "tensor x pipeline", "products on the CPU"], rows),
        tag("p", machine, class_="soft"),
        tag("p", text("Directories: "), ", ".join(str(run.directory) for run in runs), class_="soft"),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
