"""What a run's TensorBoard files hold, by TensorBoard's own reader."""

import json
from pathlib import Path
from typing import Any


def scalars(directory: Path) -> dict[tuple[str, int], float]:
    """Values by (tag, step)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}


def same_as_steps(run_dir: Path, *keys: str) -> None:
    """Every training step's figures are in the files as they are in steps.jsonl, to float32."""
    found = scalars(run_dir / "tensorboard")
    lines: list[dict[str, Any]] = [json.loads(x) for x in (run_dir / "steps.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] in ("train", "valid")]
    assert trained
    for line in trained:
        for key in keys if line["split"] == "train" else ["loss"]:
            told = found[f"{line['split']}/{key}", line["step"]]
            assert abs(told - line[key]) <= 1e-6 * abs(line[key]), (line, key, told)
