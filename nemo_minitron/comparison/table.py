"""compare.csv and compare.md."""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_minitron.comparison.published import TABLES
from nemo_minitron.comparison.rows import Cell, Model, Row, Speed
from nemo_minitron.wording import count

_COLUMNS = (
    *("model", "group", "measure", "value", "stderr", "items", "chance", "at_chance"),
    *("difference", "difference_stderr", "note"),
)


@dataclass(frozen=True)
class Table:
    """All of it. `machine`: what the speed was measured on; `how`: with which prompt; `said`: what was left out."""

    models: list[Model]
    baseline: str
    scores: list[Row]
    text: list[Row]
    said: list[str]
    command: str
    machine: str
    how: str
    published: bool


def sizes_of(model: Model) -> list[tuple[str, float | None, str]]:
    """(measure, value, as Markdown shows it) of a model's size, training and speed."""
    speed, training = model.speed, model.training
    return [
        ("parameters", model.parameters, _count(model.parameters)),
        ("non-embedding parameters", model.non_embedding, _count(model.non_embedding)),
        ("tokens trained", training.tokens, _count(training.tokens)),
        ("training FLOPs", training.flops, "" if training.flops is None else f"{training.flops:.2e}"),
        ("weights, bytes", model.bytes, "" if model.bytes is None else f"{model.bytes / 2**20:,.1f} MiB"),
        _speed("decoded tokens/s", speed, lambda s: s.tokens_per_s, ".1f"),
        _speed("time to first token, s", speed, lambda s: s.first_s, ".3f"),
        _speed("peak memory, GiB", speed, lambda s: s.memory_gib, ".2f"),
    ]


def _speed(
    name: str, speed: Speed | None, of: Callable[[Speed], list[float]], form: str
) -> tuple[str, float | None, str]:
    if speed is None:
        return name, None, ""
    values = of(speed)
    middle = statistics.median(values)
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return name, middle, f"{middle:{form}}{spread}"


def _count(number: int | None) -> str:
    return "" if number is None else count(number)


def as_csv(table: Table) -> str:
    """A line for each model and measure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row in (*table.scores, *table.text):
        for name, cell in row.cells.items():
            writer.writerow({"model": name, "group": row.group, "measure": row.name} | _csv_cell(cell))
    for model in table.models:
        for measure, value, _ in sizes_of(model):
            if value is not None:
                group = "speed" if model.speed is not None and measure in _MEASURED else "size"
                writer.writerow({"model": model.name, "group": group, "measure": measure, "value": value})
    return text.getvalue()


_MEASURED = ("decoded tokens/s", "time to first token, s", "peak memory, GiB")


def _csv_cell(cell: Cell) -> dict[str, object]:
    found: dict[str, object] = {
        "value": cell.value,
        "stderr": cell.stderr,
        "items": cell.items,
        "chance": cell.chance,
        "at_chance": "yes" if cell.at_chance else "",
    }
    if (d := cell.difference) is not None:
        found |= {"difference": d.value, "difference_stderr": d.stderr, "note": d.why}
    return {key: "" if value is None else value for key, value in found.items()}


def as_markdown(table: Table) -> str:
    """The page."""
    parts = [f"# {', '.join(model.name for model in table.models)}", f"```\n{table.command}\n```"]
    parts += ["## Scores", _scores(table)]
    if (found := _differences(table)) is not None:
        parts += [f"## Differences from {_escaped(table.baseline)}", found]
    parts += [f"- {_escaped(line)}" for line in table.said]
    parts += ["## Size and speed", _sizes(table)]
    if table.published:
        parts += ["## Published by others", _PUBLISHED]
        for title, columns, rows in TABLES:
            parts += [f"{title}:", _table(columns, rows)]
    return "\n\n".join(parts) + "\n"


_PUBLISHED = (
    "Not measured here, and not comparable with the rows above: "
    "other harness versions, prompts, precisions, machines."
)


def _scores(table: Table) -> str:
    names = [model.name for model in table.models]
    rows = [
        (row.group, row.name, *(_score(row.cells.get(name)) for name in names))
        for row in (*table.scores, *table.text)
    ]
    note = (
        "± is the standard error. *At chance*: the 95 % interval reaches what a guess scores."
        if any(row.cells for row in table.scores)
        else "No benchmark was run: eval.tasks."
    )
    return f"{_table(('group', 'measure', *names), rows)}\n\n{note}"


def _score(cell: Cell | None) -> str:
    if cell is None:
        return ""
    error = "" if cell.stderr is None else f" ± {cell.stderr:.3f}"
    of = "" if cell.items is None else f" (n = {cell.items:,})"
    return f"{cell.value:.3f}{error}{of}{', *at chance*' if cell.at_chance else ''}"


def _differences(table: Table) -> str | None:
    """Paired over the same items; None with a single model."""
    others = [model.name for model in table.models if model.name != table.baseline]
    rows = [
        (row.name, *(_difference(row.cells.get(name)) for name in others))
        for row in (*table.scores, *table.text)
        if any(cell.difference is not None for cell in row.cells.values())
    ]
    if not rows:
        return None
    note = (
        "Paired: the mean of the items' differences, ± its standard error. **Bold**: zero lies outside of its 95 % "
        "interval."
    )
    return f"{_table(('measure', *others), rows)}\n\n{note}"


def _difference(cell: Cell | None) -> str:
    if cell is None or (d := cell.difference) is None:
        return ""
    if d.value is None:
        return f"none: {d.why}"
    text = f"{d.value:+.3f}" + ("" if d.stderr is None else f" ± {d.stderr:.3f}")
    return f"**{text}**" if d.is_clear else text


def _sizes(table: Table) -> str:
    rows = []
    for model in table.models:
        engine = "" if model.speed is None else f"{model.speed.engine}, {model.speed.device}"
        left_out = f" (without {', '.join(model.training.left_out)})" if model.training.left_out else ""
        cells = [shown for _, _, shown in sizes_of(model)]
        cells[2:4] = [f"{cell}{left_out}" if cell else "" for cell in cells[2:4]]
        rows.append((model.name, *cells, engine))
    columns = ("model", *(name for name, _, _ in sizes_of(table.models[0])), "by")
    notes = [
        "Tokens and FLOPs are those of the runs since the base model, where there are any; its own are not known here. "
        "FLOPs: forward and backward passes of the student, forward passes of the teacher."
    ]
    if any(model.speed is not None for model in table.models):
        notes.append(f"{table.how} {table.machine}")
    return "\n\n".join([_table(columns, rows), *notes])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, columns)) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Of a name that is a file's: one line, no column of its own."""
    return " ".join(text.replace("|", "\\|").split())
