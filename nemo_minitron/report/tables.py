"""The page's tables: before and after, evaluations, what a run took."""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from nemo_minitron.report.chain import Run, finite
from nemo_minitron.report.markup import Markup, table, tag

_LOSSES = (
    ("LM loss, nats a token", "lm_loss_nats_before", "lm_loss_nats_after"),
    ("validation loss, nats", "valid_loss_nats_before", "valid_loss_nats_after"),
    ("task accuracy", "task_accuracy_before", "task_accuracy_after"),
    ("parameters", "params_before", "params_after"),
    ("without embeddings", "non_embedding_params_before", "non_embedding_params_after"),
)
_FIGURES = (
    ("LM loss, nats", "lm_loss_nats"),
    ("perplexity", "perplexity"),
    ("bits per byte", "bits_per_byte"),
    ("token accuracy", "token_accuracy"),
    ("KL from the teacher, nats", "kl_from_teacher_nats"),
    ("top-1 agreement", "top1_agreement"),
    ("instruct set, strict", "overall_score"),
    ("instruct set, lenient", "overall_score_lenient"),
)


def before_after(runs: Sequence[Run]) -> Markup:
    """What each run changed."""
    rows = []
    for run in runs:
        for name, before, after in _LOSSES:
            a, b = run.number(before), run.number(after)
            if b is not None:
                rows.append(
                    [run.directory.name, name, "–" if a is None else shown(a), shown(b), _ratio(a, b)]
                )
        if (teacher := run.number("lm_loss_nats_teacher")) is not None:
            rows.append([run.directory.name, "LM loss of the teacher", "", shown(teacher), ""])
        if (kl := run.number("kl_nats_after")) is not None:
            rows.append([run.directory.name, "KL from the teacher, nats", "", shown(kl), ""])
        rows += [[run.directory.name, f"{axis}", *kept] for axis, kept in _kept(run)]
    if not rows:
        return Markup("")
    note = "Losses of different runs compare only where held-out data and sequence length are the same."
    return tag(
        "section",
        tag("h2", "Before and after"),
        table(["run", "what", "before", "after", "of before"], rows),
        tag("p", note, class_="soft"),
    )


def _kept(run: Run) -> list[tuple[str, list[str]]]:
    found = run.result.get("kept")
    rows = []
    for axis, pair in found.items() if isinstance(found, dict) else ():
        numbers = [finite(n) for n in pair] if isinstance(pair, list) and len(pair) == 2 else [None]
        if None not in numbers:
            kept, of = (n or 0.0 for n in numbers)
            rows.append((str(axis), [shown(of), shown(kept), _ratio(of, kept)]))
    return rows


def _ratio(before: float | None, after: float) -> str:
    return f"{after / before:.0%}" if before else ""


def evaluations(runs: Sequence[Run]) -> Markup:
    """What was measured of the models: a table of figures, and one of benchmark scores with their errors."""
    figures, scores = [], []
    for run in runs:
        of = PurePath(str(run.result.get("source", ""))).name
        for name, key in _FIGURES:
            if (value := run.number(key)) is not None:
                figures.append([run.directory.name, of, name, shown(value)])
        rows = run.result.get("scores")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and (score := finite(row.get("score"))) is not None:
                scores.append([run.directory.name, of, *_score(row, score)])
    parts: list[Any] = []
    if figures:
        parts.append(table(["run", "of", "figure", "value"], figures))
    if scores:
        parts.append(table(["run", "of", "task", "metric", "score", "items", "chance"], scores))
    return tag("section", tag("h2", "Evaluation"), *parts) if parts else Markup("")


def _score(row: dict[str, Any], score: float) -> list[Any]:
    error, chance = finite(row.get("stderr")), finite(row.get("chance"))
    at = " (at chance)" if row.get("at_chance") is True else ""
    return [
        str(row.get("task", "")),
        str(row.get("metric", "")),
        f"{score:.3f}" + ("" if error is None else f" ± {error:.3f}"),
        shown(items) if (items := finite(row.get("items"))) is not None else "",
        "" if chance is None else f"{chance:.3f}{at}",
    ]


def resources(run: Run) -> list[str]:
    """Time, memory, ranks, layout, arithmetic."""
    peak, ranks, wall = run.number("peak_rss_gib"), run.number("ranks"), run.number("wall_s")
    layout = [run.number(f"{way}_model_parallel_size") for way in ("tensor", "pipeline")]
    return [
        "" if wall is None else duration(wall),
        "" if peak is None else f"{peak:.2f} GiB",
        "" if ranks is None else f"{ranks:.0f}",
        " x ".join(f"{n:.0f}" for n in layout if n is not None),
        str(run.result.get("cpu_products", "")),
    ]


def change(run: Run, before: str, after: str) -> str:
    """ "3.718 → 2.973", or the second alone."""
    a, b = run.number(before), run.number(after)
    if b is None:
        return ""
    return f"{b:.3f}" if a is None else f"{a:.3f} → {b:.3f}"


def shown(value: float) -> str:
    """A number as one reads it: counts with their thousands, measurements with four digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """41 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plain(value: Any) -> str:
    """JSON for reading."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
