"""The work of `recipes/plan_run.py`: say what a pipeline or a run will need, before it is started."""

import importlib
import sys
from pathlib import Path
from typing import Any

from nemo_minitron.config.plan import HERE, PlanRecipe
from nemo_minitron.files import write_text
from nemo_minitron.planning.layouts import Option, step_flops
from nemo_minitron.planning.machines import GIB, Cluster
from nemo_minitron.workflows.plan_run.check import Planned, Prepared

PAGE = "plan.md"
_HOUR = 3600


def run(r: PlanRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Estimate every step, write RUN/plan.md, and print it.

    Returns:
        The fields of `result.json`: `steps`, a row each, and their sums.
    """
    cluster = prepared.cluster
    rows = [_row(planned, cluster) for planned in prepared.steps]
    page = _page(rows, prepared.steps, cluster, r.plan.layouts)
    write_text(directory / PAGE, page)
    print(page, file=sys.stderr, flush=True)
    hours = sum(row["gpu_hours"] for row in rows)
    return {
        "recipe": "plan_run",
        "gpu": cluster.device.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.per_node,
        "efficiency": None if cluster.device.name == HERE else cluster.efficiency,
        "steps_planned": rows,
        "trained_tokens": sum(row["tokens"] for row in rows),
        "pflop": sum(row["pflop"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "gpu_hours": hours,
        "cost": None if cluster.price_per_hour is None else hours * cluster.price_per_hour,
        "most_memory_gib": max((row["memory_gib"] for row in rows), default=0.0),
    }


def _row(planned: Planned, cluster: Cluster) -> dict[str, Any]:
    best = planned.options[0] if planned.options else None
    layout = best.layout if best else planned.layout
    memory = best.memory if best else planned.memory
    step_s = _step_seconds(planned, cluster)
    training, work = planned.work.training, planned.work
    passes = _pass_seconds(planned, cluster)
    seconds = passes + (step_s * training.steps * work.trainings if training and step_s else 0.0)
    devices = _devices(planned, cluster)
    flops = work.pass_flops + (step_flops(training) * training.steps * work.trainings if training else 0.0)
    hours = seconds * devices / _HOUR
    return {
        "step": planned.step.name,
        "recipe": planned.step.recipe,
        "params": work.model.parameters() if work.model else None,
        "tokens": work.tokens,
        "pflop": flops / 1e15,
        "steps": training.steps if training else 0,
        "step_s": step_s,
        "seconds": seconds,
        "devices": devices,
        "gpu_hours": hours,
        "cost": None if cluster.price_per_hour is None else hours * cluster.price_per_hour,
        "memory_gib": memory.total / GIB,
        "memory_parts_gib": {name: value / GIB for name, value in memory.parts.items()},
        "memory_gib_as_configured": planned.memory.total / GIB,
        "layout": layout.settings(),
        "not_counted": work.unknown,
    }


def _step_seconds(planned: Planned, cluster: Cluster) -> float | None:
    """Of a training step: measured here, or of the fastest layout."""
    training = planned.work.training
    if training is None:
        return None
    if cluster.device.name == HERE:
        return float(_calibration().step_seconds(training, planned.layout.micro_batch))
    return planned.options[0].step_s


def _pass_seconds(planned: Planned, cluster: Cluster) -> float:
    """Of what is not training."""
    work = planned.work
    if cluster.device.name == HERE:
        taken = _calibration().pass_seconds
        return float(sum(taken(p.model, p.tokens, work.micro_batch, work.length) for p in work.passes))
    rate = cluster.device.peak[work.precision] * cluster.efficiency * _devices(planned, cluster)
    return work.pass_flops / rate


def _calibration() -> Any:
    """What times this machine; a plan for GPUs need not wait for NeMo's imports."""
    return importlib.import_module(f"{__package__}.calibration")


def _devices(planned: Planned, cluster: Cluster) -> int:
    """All of them where a layout was chosen for them, else as many as the configured one takes."""
    return cluster.devices if planned.options else min(planned.layout.ranks, cluster.devices)


# ---- the page ------------------------------------------------------------------------------------------------


def _page(rows: list[dict[str, Any]], steps: list[Planned], cluster: Cluster, shown: int) -> str:
    lines = [f"# Estimated, not measured: {_place(cluster)}", ""]
    cost = cluster.price_per_hour is not None
    head = "| step | recipe | parameters | tokens | PFLOP | GiB a rank | a step | in all | GPU-hours |"
    lines += [head + (" cost |" if cost else ""), "|---" * (9 + cost) + "|"]
    for row in rows:
        lines.append(_line(row, cost=cost))
    hours, seconds = sum(row["gpu_hours"] for row in rows), sum(row["seconds"] for row in rows)
    total = f"| all | | | {sum(r['tokens'] for r in rows):,} | {sum(r['pflop'] for r in rows):,.3g} "
    total += f"| {max(r['memory_gib'] for r in rows):.2f} | | {_time(seconds)} | {hours:,.2f} |"
    lines.append(total + (f" {sum(r['cost'] for r in rows):,.2f} |" if cost else ""))
    for planned, row in zip(steps, rows, strict=True):
        lines += _of_memory(planned, row)
        lines += _of_layouts(planned.options[:shown], planned)
    if told := [f"{row['step']}: {row['not_counted']}" for row in rows if row["not_counted"]]:
        lines += ["", f"Not counted: {'; '.join(told)}."]
    return "\n".join(lines) + "\n"


def _place(cluster: Cluster) -> str:
    d = cluster.device
    if d.name == HERE:
        return f"one process here, timed just now, {d.memory / GIB:.1f} GiB"
    return (
        f"{cluster.nodes} x {cluster.per_node} {d.name}, {d.memory / GIB:.1f} GiB of each for tensors, "
        f"{cluster.efficiency:.0%} of the peak of {d.peak['bf16-mixed'] / 1e12:,.0f} TFLOP/s (bf16) assumed"
    )


def _line(row: dict[str, Any], *, cost: bool) -> str:
    params = "" if row["params"] is None else f"{row['params']:,}"
    step = "" if row["step_s"] is None else _time(row["step_s"])
    tokens = f"{row['tokens']:,}" if row["tokens"] else ""
    line = f"| {row['step']} | {row['recipe']} | {params} | {tokens} "
    line += f"| {row['pflop']:,.3g} | {row['memory_gib']:.2f} | {step} | {_time(row['seconds'])} "
    line += f"| {row['gpu_hours']:,.2f} |"
    return line + (f" {row['cost']:,.2f} |" if cost else "")


def _of_memory(planned: Planned, row: dict[str, Any]) -> list[str]:
    if planned.work.training is None:
        return []
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f}"
        for name, value in row["memory_parts_gib"].items()
        if value >= 0.005
    )
    return ["", f"{planned.step.name}, GiB a rank: {parts}."]


def _of_layouts(options: list[Option], planned: Planned) -> list[str]:
    if not options:
        return []
    lines = ["", f"{planned.step.name}: layouts that fit, the fastest first", ""]
    lines += [
        "| tensor | pipeline | data | sequence parallel | recompute | micro batch | GiB a rank | a step |",
        "|---" * 8 + "|",
    ]
    for option in options:
        x = option.layout
        lines.append(
            f"| {x.tp} | {x.pp} | {x.dp} | {'yes' if x.sequence_parallel else ''} | {x.recompute or ''} "
            f"| {x.micro_batch} | {option.memory.total / GIB:.1f} | {_time(option.step_s)} |"
        )
    configured = planned.memory.total / GIB
    lines += ["", f"As configured ({planned.layout.ranks} ranks): {configured:.1f} GiB a rank."]
    return lines


def _time(seconds: float) -> str:
    """In the unit that reads best."""
    if seconds < 1:
        return f"{seconds * 1000:,.0f} ms"
    for limit, size, unit in ((120, 1, "s"), (2 * _HOUR, 60, "min"), (48 * _HOUR, _HOUR, "h")):
        if seconds < limit:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds / 24 / _HOUR:,.1f} days"
