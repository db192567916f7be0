"""Finished runs as files, with texts that try to be HTML."""

import json
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.importance.scores import Scores
from nemo_minitron.pruning import Kept, PrunePlan

EVIL = '<img src="https://evil.test/x.png" onerror="alert(1)"><script>alert(2)</script>&"\'$\\frac{1}'
SOURCE = Architecture(3, 16, 32, 4, 2, 4, 32)
TARGET = Architecture(3, 16, 24, 4, 2, 4, 32)


def write_run(home: Path, name: str, result: dict[str, Any], steps: Any = (), samples: Any = ()) -> Path:
    run = home / name
    run.mkdir()
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.yaml").write_text(
        f"# python recipes/{result.get('recipe')}.py note={EVIL}\nnote: {EVIL}\n"
    )
    for file, rows in (("steps.jsonl", steps), ("samples.jsonl", samples)):
        if rows:
            (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    return run


def hostile_runs(home: Path) -> dict[str, Path]:
    """A chain of four finished runs, by name; texts of their files try to get into the page as HTML."""
    base = home / f"base {EVIL[:4]}"
    base.mkdir()
    pruned = write_run(
        home,
        "pruned",
        {"recipe": "prune", "source": str(base), "params_before": 3_000_000, "params_after": 2_000_000}
        | {
            "lm_loss_nats_before": 2.5,
            "lm_loss_nats_after": 3.75,
            "kept": {"ffn_hidden_size": [24, 32], "x": 1},
        },
    )
    tensors = {"ffn_hidden_size": torch.rand(3, 32), "hidden_size": torch.rand(16)}
    tensors |= {"layers/block_influence": torch.rand(3)}
    Scores(SOURCE, "0" * 64, "l2", "mean", 4, 512, "", tensors).save(pruned / "scores.safetensors")
    kept = Kept(ffn_hidden_size=[list(range(24))] * 3)
    PrunePlan("0" * 64, SOURCE, TARGET, {}, kept).save(pruned / "plan.json")
    train = [
        {"step": n, "split": "train", "loss": 1 / (n + 1), "lm_loss": 3 - n / 60, "kl": 1 / (n + 1)}
        for n in range(60)
    ]
    odd: list[dict[str, Any]] = [
        {"step": "x", "split": "train", "kl": EVIL},
        {"step": 61, "split": "train", "kl": None},
    ]
    learned = write_run(
        home,
        "learned",
        {
            "recipe": "distill",
            "student": str(pruned),
            "teacher": str(base),
            "params": 2_000_000,
            "tokens": 5_000,
        }
        | {
            "lm_loss_nats_before": 3.75,
            "lm_loss_nats_after": 2.75,
            "lm_loss_nats_teacher": 2.5,
            "note": EVIL,
        },
        [*train, *odd, {"step": 59, "split": "valid", "lm_loss": 2.75, "kl": 0.25}],
    )
    said = [{"step": s, "prompt": f"Q {EVIL}", "answer": f"A{s} {EVIL}", "reference": "R"} for s in (0, 8)]
    tuned = write_run(home, "tuned", {"recipe": "sft", "student": str(learned)}, samples=said)
    scores = [
        {
            "task": EVIL,
            "metric": "acc",
            "score": 0.25,
            "stderr": 0.03,
            "items": 100,
            "chance": 0.25,
            "at_chance": True,
        }
    ]
    measured = write_run(
        home,
        "measured",
        {"recipe": "evaluate", "source": str(tuned), "perplexity": 12.5, "scores": scores},
    )
    return {"pruned": pruned, "learned": learned, "tuned": tuned, "measured": measured}
