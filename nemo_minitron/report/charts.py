"""Charts as SVG inside the page, by matplotlib: NeMo imports it anyway, and its SVG needs no script.

Colours are written as CSS variables, so that one picture serves light, dark and paper; text stays text.
"""

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nemo_minitron.importance.pictures import depth_curves, heat_map
from nemo_minitron.importance.scores import Scores
from nemo_minitron.report.chain import Run, curve

# What matplotlib is told, and what the page has in its place.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#040506": "var(--line)",
    "#070809": "var(--c1)",
    "#0a0b0c": "var(--c2)",
    "#0d0e0f": "var(--c3)",
    "#101112": "var(--c4)",
}
_INK, _LINE, *_SERIES = _VARIABLES
_RULES = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "figure.facecolor": "none",
    "legend.frameon": False,
}
_KINDS = {"loss": "training loss", "lm_loss": "LM loss", "kl": "KL from the teacher"}


def units_chart(scores: Scores, axis: str, kept: Any) -> str:
    """A heat map of one axis, layers over units."""
    rows = scores.tensors[axis].shape[0] if scores.tensors[axis].dim() > 1 else 1
    height = min(6.0, 1.3 + 0.09 * max(rows, 8)) if rows > 1 else 1.3

    def draw(figure: Any) -> None:
        plot = figure.subplots()
        figure.colorbar(heat_map(plot, scores, axis, kept), ax=plot, label="log10 score", pad=0.02)

    return _svg(draw, (9, height), f"importance of {axis}")


def depth_chart(scores: Scores, metric: str, layers: Any) -> str:
    """What the model loses without each layer."""
    return _svg(lambda f: depth_curves(f.subplots(), scores, metric, layers), (9, 2.6), f"{metric} by layer")


def training_charts(run: Run) -> list[tuple[str, str]]:
    """(title, SVG) of the curves of a training run: losses with the teacher's, KL, tokens a second."""
    teacher = run.number("lm_loss_nats_teacher")
    charts = []
    shown = [key for key in ("lm_loss", "kl", "loss") if curve(run.steps, "train", key)[0]]
    if "loss" in shown and curve(run.steps, "train", "loss") in [
        curve(run.steps, "train", key) for key in shown if key != "loss"
    ]:
        shown.remove("loss")  # of pure distillation the loss is the KL
    for key in shown:
        title = f"{_KINDS[key]}, nats a token"
        draw = partial(_curves, run=run, key=key, teacher=teacher if key == "lm_loss" else None)
        charts.append((title, _svg(draw, (9, 2.8), f"{run.directory.name} {title}")))
    return charts


def _curves(figure: Any, run: Run, key: str, teacher: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    plot = figure.subplots()
    x, y = curve(run.steps, "train", key)
    plot.plot(x, y, color=_SERIES[0], linewidth=1, alpha=0.35 if len(x) > 40 else 1.0, label="training")
    if len(x) > 40:
        plot.plot(x, _smooth(y), color=_SERIES[0], linewidth=1.6, label="training, smoothed")
    x, y = curve(run.steps, "valid", key)
    if x:
        plot.plot(x, y, color=_SERIES[1], marker="o", markersize=4, linewidth=1.2, label="held out")
    if teacher is not None:
        plot.axhline(teacher, color=_SERIES[2], linestyle="--", linewidth=1.2, label=f"teacher {teacher:.3f}")
    plot.grid(axis="y", linewidth=0.5)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.set_xlabel("step")
    plot.set_ylabel("nats a token")
    plot.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=4)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean that begins at the first value."""
    found: list[float] = []
    for value in values:
        found.append(value if not found else keep * found[-1] + (1 - keep) * value)
    return found


def _svg(draw: Callable[[Any], None], size: tuple[float, float], label: str) -> str:
    """What `draw` puts into a figure, as an SVG element without ids that another picture has."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    cycle = rc_context({**_RULES, "svg.hashsalt": label})
    with cycle:
        from cycler import cycler
        from matplotlib import rcParams

        rcParams["axes.prop_cycle"] = cycler(color=_SERIES)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Without what a page does not need, with the page's colours, and ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    for told, variable in _VARIABLES.items():
        svg = svg.replace(told, variable)
    own = f"{re.sub(r'[^a-z0-9]', '-', label.casefold())}-"
    svg = re.sub(r'(?<=[ \n]id=")', own, svg)
    svg = re.sub(r'(?<=url\(#)|(?<=href="#)', own, svg)
    named = re.sub(r"[<>&\"]", " ", label)
    return svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{named}"', 1)
