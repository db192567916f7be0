"""compare.png: quality over size, and over decoding speed."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.comparison.rows import TEXT_GROUP, Model, Row, quality

_MARKERS = "osD^vP*Xhd"
_WIDE = 3.0  # a range so many times as wide as its start is drawn on a logarithmic axis


def draw(models: Sequence[Model], scores: Sequence[Row], text: Sequence[Row], path: Path) -> bool:
    """Write the picture: a row of panels for benchmarks, one for bits a byte, as far as all models have them.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = _qualities(models, scores, text)
    columns = [(label, values) for label, values in _across(models) if values]
    if not kinds or not columns:
        return False
    size = (4.6 * len(columns), 3.4 * len(kinds) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(kinds), len(columns), squeeze=False)
    for row, (title, values, chance) in zip(plots, kinds, strict=True):
        for plot, (label, across) in zip(row, columns, strict=True):
            _panel(plot, models, across, values)
            plot.set_xlabel(label)
            if chance is not None:
                plot.axhline(chance, color="gray", linestyle=":", linewidth=1)
                plot.annotate(
                    "a guess", (0.01, chance), xycoords=("axes fraction", "data"), fontsize=7, va="bottom"
                )
        row[0].set_ylabel(title)
        if chance is None and values and title.startswith("bits"):
            for plot in row:
                plot.invert_yaxis()
    handles, labels = plots[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=110)
    return True


def _qualities(
    models: Sequence[Model], scores: Sequence[Row], text: Sequence[Row]
) -> list[tuple[str, dict[str, tuple[float, float]], float | None]]:
    """(label of the axis, value and error by model, what a guess scores)."""
    title, values, chance = quality(scores, models)
    found = [(title, values, chance)] if values else []
    names = {model.name for model in models}
    for row in text:
        if row.group == TEXT_GROUP and row.name.startswith("bits") and set(row.cells) == names:
            bits = {name: (cell.value, 0.0) for name, cell in row.cells.items()}
            found.append(("bits a byte (better is up)", bits, None))
    return found


def _across(models: Sequence[Model]) -> list[tuple[str, dict[str, float]]]:
    """(label of the axis, value by model), empty where a model has none."""
    sizes = {m.name: m.parameters / 1e6 for m in models if m.parameters is not None}
    speeds = {m.name: statistics.median(m.speed.tokens_per_s) for m in models if m.speed is not None}
    whole = [("parameters, millions", sizes), ("decoded tokens/s", speeds)]
    return [(label, values if len(values) == len(models) else {}) for label, values in whole]


def _panel(
    plot: Any, models: Sequence[Model], across: dict[str, float], values: dict[str, tuple[float, float]]
) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for number, model in enumerate(models):
        value, error = values[model.name]
        plot.errorbar(
            across[model.name],
            value,
            yerr=error or None,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=7,
            capsize=3,
            linestyle="none",
            label=model.name,
        )
    low, high = min(across.values()), max(across.values())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if high > _WIDE * low > 0:
        plot.set_xscale("log", subs=(2, 3, 5))
        plot.xaxis.set_minor_formatter(plain)
        plot.set_xlim(low / 1.3, high * 1.3)
    else:
        plot.xaxis.set_minor_formatter(NullFormatter())
        room = 0.15 * (high - low) or 0.15 * high
        plot.set_xlim(low - room, high + room)
    plot.xaxis.set_major_formatter(plain)
    plot.grid(alpha=0.25)
