"""What the study's runs came to: the gap to the teacher of each arm, with error bars, and what that says of a claim."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.home import Home
from benchmarks.study.rows import Claim, Row

# An error bar reaches so many standard errors of the mean to either side.
_BAR = 2.0


@dataclass(frozen=True)
class Arm:
    """`gaps`: of each seed that is done, LM loss less the teacher's on the same sequences, nats a token."""

    gaps: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds; NaN where none is done."""
        return statistics.fmean(self.gaps) if self.gaps else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean, by the deviation of the sample; NaN of fewer than two seeds."""
        if len(self.gaps) < 2:
            return math.nan
        return statistics.stdev(self.gaps) / math.sqrt(len(self.gaps))

    @property
    def bar(self) -> float:
        """Half of the error bar."""
        return _BAR * self.standard_error


def verdict(claim: Claim, arms: Mapping[str, Arm]) -> str:
    """held, not held, or not decided and why: fewer than two seeds, or error bars that overlap or touch."""
    better, worse = arms[claim.better], arms[claim.worse]
    if few := [name for name in (claim.better, claim.worse) if len(arms[name].gaps) < 2]:
        return f"not decided: fewer than two seeds of {' and of '.join(few)}"
    said = f"{shown(better)}, {shown(worse)}"
    if abs(better.mean - worse.mean) <= better.bar + worse.bar:
        return f"not decided, the error bars overlap: {said}"
    return f"{'held' if better.mean < worse.mean else 'not held'}: {said}"


def shown(arm: Arm) -> str:
    """Mean and half of the error bar."""
    if not arm.gaps:
        return "not run"
    return f"{arm.mean:.3f}" + (f" ± {arm.bar:.3f}" if len(arm.gaps) > 1 else "")


def arms(home: Home, row: Row, seeds: Sequence[int]) -> dict[str, Arm]:
    """The row's arms, as far as they are done."""
    study = home.study
    found: dict[str, list[float]] = {name: [] for name in row.arms}
    for seed in seeds:
        teacher = home.result(study.runs[study.measured], seed)
        for name, last in row.arms.items():
            made = home.result(study.runs[last], seed)
            if made is not None and teacher is not None:
                found[name].append(made["lm_loss_nats_after"] - teacher["lm_loss_nats_before"])
    return {name: Arm(tuple(gaps)) for name, gaps in found.items()}


def page(home: Home, seeds: Sequence[int], waiting: Mapping[str, float]) -> str:
    """Markdown of all rows.

    Args:
        waiting: hours of what is not run yet, by row.
    """
    lines = []
    for row in home.study.rows:
        measured = arms(home, row, seeds)
        lines += [
            "",
            f"### {row.asks}",
            "",
            "| arm | gap to the teacher, nats | seeds | CPU minutes of its last run |",
        ]
        lines.append("|---|---|---|---|")
        for name, arm in measured.items():
            minutes = _minutes(home, row.arms[name], seeds)
            lines.append(f"| {name} | {shown(arm)} | {len(arm.gaps)} | {minutes} |")
        lines += ["", "| claim | in the papers | here |", "|---|---|---|"]
        for claim in row.claims:
            said = verdict(claim, measured)
            lines.append(f"| {claim.better} below {claim.worse} | {claim.said} | {said} |")
        if hours := waiting.get(row.name):
            lines += ["", f"Not all of it was run: about {hours:.1f} h are left (`--only {row.name}`)."]
    return "\n".join(lines).lstrip() + "\n"


def _minutes(home: Home, last: str, seeds: Sequence[int]) -> str:
    """The mean over seeds, without the runs that it needs, which arms share."""
    run = home.study.runs[last]
    taken = [home.record(run, seed)["cpu_s"] / 60 for seed in seeds if home.result(run, seed) is not None]
    return f"{statistics.fmean(taken):.1f}" if taken else ""


def picture(home: Home, seeds: Sequence[int], file: Path) -> None:
    """Arms of all rows with their error bars, one row below the other, of which two arms are done."""
    measured = [(row, arms(home, row, seeds)) for row in home.study.rows]
    measured = [(row, {name: arm for name, arm in found.items() if arm.gaps}) for row, found in measured]
    measured = [(row, found) for row, found in measured if len(found) > 1]
    if not measured:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(found) for _, found in measured]
    figure, axes = plt.subplots(
        len(measured),
        1,
        figsize=(7.5, 0.42 * sum(heights) + 0.55 * len(measured) + 0.3),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for axis, (row, found) in zip(axes[:, 0], measured, strict=True):
        names = list(found)[::-1]
        bars = [0.0 if math.isnan(found[name].bar) else found[name].bar for name in names]
        axis.errorbar([found[name].mean for name in names], range(len(names)), xerr=bars, fmt="o", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_title(row.asks, fontsize=9, loc="left")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("LM loss above the teacher's, nats a token")
    figure.savefig(file, dpi=110)
    plt.close(figure)
