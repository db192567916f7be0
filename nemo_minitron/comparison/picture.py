"""compare.png: quality over size, and over decoding speed."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.comparison.rows import TEXT_GROUP, Model, Row, quality

_MARKERS = "osD^vP*Xhd"
_WIDE = 3.0  # a range so many times as wide as its start is drawn on a logarithmic axis
_BESIDE = 5  # points between models that stand at the same place of an axis


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


def _across(models: Sequence[Model]) -> list[tuple[str, dict[str, list[float]]]]:
    """(label of the axis, what was measured by model), empty where a model has none."""
    sizes = {m.name: [m.parameters / 1e6] for m in models if m.parameters is not None}
    speeds = {m.name: list(m.speed.tokens_per_s) for m in models if m.speed is not None}
    whole = [("parameters, millions", sizes), ("decoded tokens/s, slowest to fastest round", speeds)]
    return [(label, values if len(values) == len(models) else {}) for label, values in whole]


def beside(values: Sequence[float]) -> list[float]:
    """Points to the right of its place for each value: equal ones stand beside each other, around the place."""
    same: dict[float, list[int]] = {}
    for number, value in enumerate(values):
        same.setdefault(value, []).append(number)
    found = [0.0] * len(values)
    for numbers in same.values():
        for place, number in enumerate(numbers):
            found[number] = _BESIDE * (2 * place - len(numbers) + 1)
    return found


def _panel(
    plot: Any,
    models: Sequence[Model],
    across: dict[str, list[float]],
    values: dict[str, tuple[float, float]],
) -> None:
    from matplotlib.transforms import ScaledTranslation

    places = [statistics.median(across[model.name]) for model in models]
    for number, (model, place, right) in enumerate(zip(models, places, beside(places), strict=True)):
        value, error = values[model.name]
        measured = across[model.name]
        drawn = plot.errorbar(
            place,
            value,
            xerr=[[place - min(measured)], [max(measured) - place]] if len(measured) > 1 else None,
            yerr=error or None,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=7,
            capsize=3,
            linestyle="none",
            label=model.name,
        )
        aside = ScaledTranslation(right / 72, 0, plot.figure.dpi_scale_trans)
        for part in drawn.get_children():
            part.set_transform(part.get_transform() + aside)
    every = [value for measured in across.values() for value in measured]
    _scale(plot, min(every), max(every))


def _scale(plot: Any, low: float, high: float) -> None:
    """The axis of sizes or speeds, with plain numbers, logarithmic where they differ much."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

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
