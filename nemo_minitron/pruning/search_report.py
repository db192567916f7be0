"""The table and the plot of a search."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_minitron.arch import Architecture
from nemo_minitron.pruning.search import Candidate, Workload

_AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_COLUMNS = (
    "rank",
    *_AXES,
    "parameters",
    "non_embedding_parameters",
    "flops_per_token",
    "memory_bytes",
    "lm_loss_nats",
)


def write_report(
    tried: Sequence[Candidate],
    losses: Mapping[str, float],
    source: Architecture,
    source_loss: float,
    load: Workload,
    directory: Path,
) -> None:
    """Write search.csv, search.md and search.png.

    Args:
        tried: best first.
        losses: LM loss in nats by candidate name.
        source, source_loss: the unpruned model, for comparison (rank 0 in the table).
        load: what FLOPs and memory are counted for.
        directory: where the files go.
    """
    unpruned = Candidate(source, load.costs(source))
    rows = [_row(0, unpruned, source_loss)]
    rows += [_row(i + 1, candidate, losses[candidate.name]) for i, candidate in enumerate(tried)]
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (directory / "search.csv").write_text(text.getvalue())
    (directory / "search.md").write_text(_markdown(rows, load))
    _plot(tried, losses, unpruned, source_loss, directory / "search.png")


def _row(rank: int, candidate: Candidate, nats: float) -> dict[str, object]:
    sizes = {axis: getattr(candidate.architecture, axis) for axis in _AXES}
    return {"rank": rank, **sizes, **candidate.costs, "lm_loss_nats": round(nats, 6)}


def _markdown(rows: Sequence[Mapping[str, object]], load: Workload) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in _COLUMNS) + " |" for row in rows]
    note = (
        f"Rank 0 is the unpruned model. FLOPs of a forward pass per token at {load.context} tokens of context; memory "
        f"of weights and keys/values of {load.sequences} such sequence(s) at {load.bytes_per_value} bytes a value."
    )
    return "\n".join([*lines, "", note, ""])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _plot(
    tried: Sequence[Candidate],
    losses: Mapping[str, float],
    unpruned: Candidate,
    source_loss: float,
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    layers = [c.architecture.num_layers for c in tried]
    marks = plot.scatter(
        [c.costs["parameters"] for c in tried], [losses[c.name] for c in tried], c=layers, cmap="viridis"
    )
    if len(set(layers)) > 1:
        figure.colorbar(marks, ax=plot, label="layers")
    plot.scatter(
        [unpruned.costs["parameters"]], [source_loss], marker="*", s=120, color="black", label="unpruned"
    )
    best = tried[0]
    plot.annotate(
        best.name,
        (best.costs["parameters"], losses[best.name]),
        textcoords="offset points",
        xytext=(4, -12),
        fontsize=8,
    )
    plot.set_xlabel("parameters")
    plot.set_ylabel("LM loss after pruning, nats a token")
    plot.legend()
    figure.savefig(path, dpi=110)
