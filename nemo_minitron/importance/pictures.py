"""Pictures of importance: curves over the depth, heat maps over layers and units."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.importance.scores import Scores

_COLUMNS = 256
_MOST_TICKS = 16
# Of the metrics that are a measurement without the layer or block.
_UNITS = {"lm_loss": "loss without it, nats", "task": "accuracy lost"}


def metrics_of(scores: Scores) -> list[str]:
    """The metrics by which layers or blocks were scored."""
    return sorted({name.split("/")[1] for name in scores.tensors if "/" in name})


def axes_of(scores: Scores, kept: Any) -> tuple[list[str], list[str]]:
    """The scored width axes of which units went, and those that were left alone.

    Args:
        kept: of a `PrunePlan`: per axis the kept indices, or None where the axis is left alone.
    """
    axes = [axis for axis in scores.tensors if "/" not in axis]
    pruned = [axis for axis in axes if kept_share(scores, axis, kept) < 1]
    return pruned, [axis for axis in axes if axis not in pruned]


def importance_picture(scores: Scores, kept: Any, path: str | Path) -> None:
    """Draw, for each metric of layers, a curve with the dropped layers shaded; then for each axis that was pruned the
    scores, one row a layer, sorted within the row, with a line where the kept units end.

    Axes that were left alone are drawn only where nothing was pruned.

    Args:
        scores: to draw.
        kept: as `axes_of`.
        path: of a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pruned, alone = axes_of(scores, kept)
    metrics = metrics_of(scores)
    axes = pruned or ([] if metrics and kept.layers is not None else alone)
    count = len(metrics) + len(axes)
    figure = Figure(figsize=(10, 2.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    plots = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for metric in metrics:
        depth_curves(plots.pop(0), scores, metric, kept.layers)
    for plot, axis in zip(plots, axes, strict=True):
        image = heat_map(plot, scores, axis, kept)
        figure.colorbar(image, ax=plot, label="log10 score")
        plot.set_title(f"{axis}: {kept_share(scores, axis, kept):.0%} kept", fontsize=9)
    figure.savefig(path, dpi=110)


def heat_map(plot: Any, scores: Scores, axis: str, kept: Any) -> Any:
    """One axis into a matplotlib plot; returns the image, log10 of the scores."""
    rows = _columns(torch.atleast_2d(scores.tensors[axis]).sort(dim=1, descending=True).values)
    count = len(rows)
    image = plot.imshow(
        rows.log10().numpy(), aspect="auto", interpolation="nearest", extent=(0, 1, count - 0.5, -0.5)
    )
    share = kept_share(scores, axis, kept)
    if share < 1:
        plot.axvline(share, color="white", linestyle="--", linewidth=1.2)
    plot.set_ylabel("layer" if count > 1 else "all layers")
    plot.set_yticks(range(0, count, max(1, -(-count // _MOST_TICKS))) if count > 1 else [])
    plot.set_xlabel("share of units, most important first")
    return image


def depth_curves(plot: Any, scores: Scores, metric: str, layers: Any) -> None:
    """What was scored by one metric, into a matplotlib plot: single layers, blocks by their first layer."""
    from matplotlib.ticker import MaxNLocator

    least = 1.0
    for name, values in sorted(scores.tensors.items(), reverse=True):
        kind, _, rest = name.partition("/")
        if rest.split("/")[0] == metric:
            label = "a layer" if kind == "layers" else f"{rest.split('/')[1]} layers from this one on"
            plot.plot(values.numpy(), marker="o", markersize=3, label=label)
            least = min(least, float(values.min()))
    dropped = sorted(set(range(scores.architecture.num_layers)) - set(layers)) if layers is not None else []
    for number, layer in enumerate(dropped):
        plot.axvspan(
            layer - 0.5, layer + 0.5, alpha=0.15, color="gray", linewidth=0, label="" if number else "dropped"
        )
    _logarithmic(plot, least)
    plot.xaxis.set_major_locator(MaxNLocator(nbins=_MOST_TICKS, integer=True))
    plot.set_title(metric, fontsize=9, loc="left")
    plot.set_xlabel("layer")
    plot.set_ylabel(_UNITS.get(metric, "score"))
    # Above the curves: anywhere on them it may cover the layers that decide.
    plot.legend(
        fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=4, frameon=False
    )


def _logarithmic(plot: Any, least: float) -> None:
    """A logarithmic scale whose ticks are plain numbers: "0.4", not "4e-01"; a task may do better without a layer."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if least <= 0:
        plot.set_yscale("symlog", linthresh=1e-2)
        plot.yaxis.set_major_formatter(plain)
        return
    plot.set_yscale("log")
    low, high = plot.get_ylim()
    # Losses lie within a decade, where the powers of ten alone would be one tick.
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 20 else (1.0, 3.0) if high / low < 1e3 else (1.0,)
    plot.yaxis.set_major_locator(LogLocator(subs=subs))
    plot.yaxis.set_major_formatter(plain)
    plot.yaxis.set_minor_formatter(NullFormatter())


def kept_share(scores: Scores, axis: str, kept: Any) -> float:
    """The share of a layer's units of an axis that stay, in (0, 1]."""
    found = getattr(kept, axis, None)
    if found is None:
        return 1.0
    tensor = scores.tensors[axis]
    first = found if tensor.dim() == 1 else found[0]
    return len(first) / tensor.shape[-1]


def _columns(rows: Tensor) -> Tensor:
    """Thin [layers, units] to a drawable number of columns; zero scores become the smallest that is drawn."""
    step = max(1, rows.shape[1] // _COLUMNS)
    rows = rows[:, ::step].double()
    positive = rows[rows > 0]
    return rows.clamp_min(float(positive.min()) if len(positive) else 1.0)
