"""Heat maps of importance, and curves over the depth."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.importance.scores import Scores

_COLUMNS = 256
# Of the metrics that are a measurement without the layer or block.
_UNITS = {"lm_loss": "loss without it, nats", "task": "accuracy lost"}


def importance_picture(scores: Scores, kept: Any, path: str | Path) -> None:
    """Draw each axis's scores, one row a layer, sorted within the row, with a line where the kept units
    end; where layers were scored, also a curve for each metric, with the dropped ones shaded.

    Args:
        scores: to draw.
        kept: of a `PrunePlan`: per axis the kept indices, or None where the axis is left alone.
        path: of a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = [axis for axis in scores.tensors if "/" not in axis]
    metrics = sorted({name.split("/")[1] for name in scores.tensors if "/" in name})
    count = len(axes) + len(metrics)
    figure = Figure(figsize=(10, 2.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    plots = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for metric in metrics:
        _depth_curves(plots.pop(), scores, metric, kept.layers)
    for plot, axis in zip(plots, axes, strict=True):
        rows = _columns(torch.atleast_2d(scores.tensors[axis]).sort(dim=1, descending=True).values)
        image = plot.imshow(
            rows.log10().numpy(), aspect="auto", interpolation="nearest", extent=(0, 1, len(rows), 0)
        )
        figure.colorbar(image, ax=plot, label="log10 score")
        share = _share(scores.tensors[axis], getattr(kept, axis, None))
        if share < 1:
            plot.axvline(share, color="white", linestyle="--", linewidth=1.2)
        plot.set_title(f"{axis}: {share:.0%} kept", fontsize=9)
        plot.set_ylabel("layer" if len(rows) > 1 else "all layers")
        plot.set_yticks([])
        plot.set_xlabel("share of units, most important first")
    figure.savefig(path, dpi=110)


def _depth_curves(plot: Any, scores: Scores, metric: str, layers: Any) -> None:
    """What was scored by one metric: single layers, blocks by their first layer."""
    from matplotlib.ticker import LogFormatter

    for name, values in sorted(scores.tensors.items(), reverse=True):
        kind, _, rest = name.partition("/")
        if rest.split("/")[0] == metric:
            label = "a layer" if kind == "layers" else f"{rest.split('/')[1]} layers from this one on"
            plot.plot(values.numpy(), marker="o", markersize=3, label=label)
            if float(values.min()) <= 0:  # a task may do better without a layer
                plot.set_yscale("symlog", linthresh=1e-2)
    dropped = sorted(set(range(scores.architecture.num_layers)) - set(layers)) if layers is not None else []
    for number, layer in enumerate(dropped):
        plot.axvspan(layer - 0.5, layer + 0.5, alpha=0.15, color="black", label="" if number else "dropped")
    if plot.get_yscale() == "linear":
        plot.set_yscale("log")
        # "3", not "3 x 10^0": losses lie within a decade.
        for which in (plot.yaxis.set_major_formatter, plot.yaxis.set_minor_formatter):
            which(LogFormatter())
    plot.set_title(metric, fontsize=9)
    plot.set_xlabel("layer")
    plot.set_ylabel(_UNITS.get(metric, "score"))
    # The first and last layers matter most, nearly everywhere: there is room between them.
    plot.legend(fontsize=8, loc="upper center")


def _columns(rows: Tensor) -> Tensor:
    """Thin [layers, units] to a drawable number of columns; zero scores become the smallest that is drawn."""
    step = max(1, rows.shape[1] // _COLUMNS)
    rows = rows[:, ::step].double()
    positive = rows[rows > 0]
    return rows.clamp_min(float(positive.min()) if len(positive) else 1.0)


def _share(scores: Tensor, kept: Any) -> float:
    if kept is None:
        return 1.0
    first = kept if scores.dim() == 1 else kept[0]
    return len(first) / scores.shape[-1]
