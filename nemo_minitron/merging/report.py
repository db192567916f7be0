"""The table and the picture of a search."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.files import write_text
from nemo_minitron.merging.evolution import REFERENCE, WORST, Candidate

_COLOURS = ("tab:blue", "tab:green")


@dataclass(frozen=True)
class Shown:
    """A model and its losses: `seen`, by which the search went, and `held_out`."""

    name: str
    seen: float
    held_out: float


def write_report(
    candidates: Sequence[Candidate],
    names: Mapping[str, Sequence[str]],
    rows: Sequence[Shown],
    measured: str,
    directory: Path,
) -> None:
    """Write evolve.csv, evolve.md and evolve.png.

    Args:
        candidates: all that is remembered; those of generation `REFERENCE` are compared with.
        names: of the numbers of each stage's vectors.
        rows: the models that were compared, then what was found.
        measured: what the losses are, with their unit.
    """
    tried = sorted(
        (c for c in candidates if c.generation != REFERENCE), key=lambda c: (c.stage, c.generation, c.number)
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for stage in names:
        writer.writerow(["stage", "generation", "candidate", "loss", *names[stage]])
        of = [c for c in tried if c.stage == stage]
        writer.writerows(
            [c.stage, c.generation, c.number, repr(c.loss), *(f"{x:.6g}" for x in c.vector)] for c in of
        )
    write_text(directory / "evolve.csv", text.getvalue())
    lines = [f"| {measured} | by which the search went | held out |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.seen:.4f} | {row.held_out:.4f} |" for row in rows]
    write_text(directory / "evolve.md", "\n".join([*lines, ""]))
    _plot(tried, rows, measured, directory / "evolve.png")


def _plot(tried: Sequence[Candidate], rows: Sequence[Shown], measured: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    begin = 0
    for stage, colour in zip(dict.fromkeys(c.stage for c in tried), _COLOURS, strict=False):
        of = [c for c in tried if c.stage == stage and c.loss < WORST]
        plot.scatter([begin + c.generation for c in of], [c.loss for c in of], s=8, alpha=0.4, color=colour)
        best, line = float("inf"), []
        last = max((c.generation for c in of), default=-1)
        for generation in range(last + 1):
            best = min([best, *(c.loss for c in of if c.generation == generation)])
            line.append(best)
        plot.plot(range(begin, begin + len(line)), line, color=colour, label=f"best so far: {stage}")
        begin += last + 1
    for number, row in enumerate(row for row in rows if not row.name.startswith("evolved")):
        plot.axhline(row.seen, linestyle="--", linewidth=1, color=f"C{number + 3}", label=row.name)
    plot.set_xlabel("generation")
    plot.set_ylabel(measured)
    plot.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
