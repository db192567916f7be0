"""The table and the plot of a search."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import WIDTH_AXES
from nemo_minitron.search.candidates import Candidate, Workload

_AXES = ("num_layers", *WIDTH_AXES)
_COLUMNS = (
    "rank",
    *_AXES,
    "parameters",
    "non_embedding_parameters",
    "flops_per_token",
    "memory_bytes",
    "lm_loss_nats",
)
# Where candidates were distilled.
_DISTILLED = ("lm_loss_nats_distilled", "rank_pruned")


def write_report(
    tried: Sequence[Candidate],
    losses: Mapping[str, float],
    distilled: Mapping[str, float],
    source: Architecture,
    source_loss: float,
    load: Workload,
    directory: Path,
) -> None:
    """Write search.csv, search.md and search.png.

    Args:
        tried: best first.
        losses: LM loss in nats right after pruning, by candidate name.
        distilled: that after a short distillation, of those that had one; where there are any, the table also tells the
            rank by `losses`.
        source, source_loss: the unpruned model, for comparison (rank 0 in the table).
        load: what FLOPs and memory are counted for.
        directory: where the files go.
    """
    unpruned = Candidate(source, load.costs(source))
    rows = [_row(0, unpruned, source_loss), *_ranked(tried, losses, distilled)]
    columns = [*_COLUMNS, *(_DISTILLED if distilled else ())]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (directory / "search.csv").write_text(text.getvalue())
    (directory / "search.md").write_text(_markdown(rows, columns, load))
    _plot(tried, losses, distilled, unpruned, source_loss, directory / "search.png")


def _row(rank: int, candidate: Candidate, nats: float) -> dict[str, object]:
    sizes = {axis: getattr(candidate.architecture, axis) for axis in _AXES}
    return {"rank": rank, **sizes, **candidate.costs, "lm_loss_nats": round(nats, 6)}


def _ranked(
    tried: Sequence[Candidate], losses: Mapping[str, float], distilled: Mapping[str, float]
) -> list[dict[str, object]]:
    before = sorted(losses[c.name] for c in tried)
    rows = []
    for rank, c in enumerate(tried, 1):
        row = _row(rank, c, losses[c.name])
        if distilled:
            row["rank_pruned"] = before.index(losses[c.name]) + 1
            row["lm_loss_nats_distilled"] = round(distilled[c.name], 6) if c.name in distilled else ""
        rows.append(row)
    return rows


def _markdown(rows: Sequence[Mapping[str, object]], columns: Sequence[str], load: Workload) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    note = (
        f"Rank 0 is the unpruned model. FLOPs of a forward pass per token at {load.context} tokens of context; memory "
        f"of weights and keys/values of {load.sequences} such sequence(s) at {load.bytes_per_value} bytes a value."
    )
    return "\n".join([*lines, "", note, ""])


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _plot(
    tried: Sequence[Candidate],
    losses: Mapping[str, float],
    distilled: Mapping[str, float],
    unpruned: Candidate,
    source_loss: float,
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    # Filled: what the rank goes by.
    ranked = [distilled.get(c.name, losses[c.name]) for c in tried]
    size = [c.costs["parameters"] for c in tried]
    _by_layers(plot, size, ranked, [c.architecture.num_layers for c in tried])
    if distilled:
        before = [losses[c.name] for c in tried]
        plot.scatter(size, before, facecolors="none", edgecolors="gray", label="right after pruning")
        plot.vlines(size, ranked, before, colors="lightgray", zorder=1)
    # A line, not a point: that lies far to the right and would leave the candidates a third of the width.
    millions = unpruned.costs["parameters"] / 1e6
    plot.axhline(source_loss, linestyle="--", color="black", linewidth=1, label=f"unpruned, {millions:.3g}M")
    plot.annotate(
        tried[0].name, (size[0], ranked[0]), textcoords="offset points", xytext=(4, -12), fontsize=8
    )
    plot.set_xlabel("parameters, millions")
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    plot.set_ylabel("LM loss, nats a token")
    plot.set_title(f"filled: after {'a short distillation' if distilled else 'pruning'}", fontsize=9)
    plot.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


def _by_layers(plot: Any, x: Sequence[float], y: Sequence[float], layers: Sequence[int]) -> None:
    """Layers are counted: a colour each, not a scale between them."""
    from matplotlib import colormaps

    found = sorted(set(layers))
    colour = {count: colormaps["viridis"](i / max(1, len(found) - 1)) for i, count in enumerate(found)}
    plot.scatter(x, y, c=[colour[count] for count in layers], zorder=3)
    for count in found:
        plot.scatter([], [], color=colour[count], label=f"{count} layers")
