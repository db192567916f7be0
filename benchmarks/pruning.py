"""What pruning in memory costs beside a plain copy of what it keeps: python benchmarks/pruning.py

Builds a Megatron GPT (one process, random weights), prunes it by a random plan, and prints a JSON line for width (every
axis at once: hidden size 3/4, MLP 9/14, half of the query groups and of the heads in each) and for depth (half of the
layers): medians over runs in seconds, and

    ratio = seconds of `prune` / seconds of copying the kept bytes

the median over runs, each of which copies right before and right after its pruning. The copy is `clone` of every
parameter of the pruned model: as many bytes as pruning keeps, contiguous. Both sides allocate, and nothing of either is
freed before both are timed; the default sizes are those of large models (a weight above 32 MiB) because for such blocks
the C library asks the system for new memory each time, which both sides then pay for, while smaller ones may be reused.
On a CPU that other processes use too, `ratio_cpu_time` is the steadier one.

Pruning's time is all of it: index lists, the copies, the release of the old weights, Megatron's building of the layers.
Depth copies nothing inside a stage, so there the ratio is that of the building alone. The goal is 2.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import models
from nemo_minitron import cpu_compat
from nemo_minitron.arch import Architecture
from nemo_minitron.pruning import PrunePlan, make_plan, prune, resolve_target

TARGETS: dict[str, dict[str, int | float | str | None]] = {
    "width": {
        "hidden_size": "3/4",
        "ffn_hidden_size": "9/14",
        "num_query_groups": "1/2",
        "num_attention_heads": "1/4",
    },
    "depth": {"num_layers": "1/2"},
}


def one_run(arch: Architecture, plan: PrunePlan, dtype: torch.dtype) -> tuple[list[float], list[float], int]:
    """(wall, CPU) seconds of pruning, and of a copy of what it keeps; the bytes of that."""
    # Pruning leaves nothing to prune again. The pruned twin is what the copy before it is made of.
    twin, gpt = (models.gpt(arch, dtype, initialised=False) for _ in range(2))
    prune([twin], plan)
    kept = [p.detach() for p in twin.parameters()]
    copies: list[torch.Tensor] = []

    def copy() -> None:
        copies.extend(t.clone() for t in kept)

    before = models.seconds(copy)
    once = models.seconds(lambda: prune([gpt], plan))
    both = zip(before, models.seconds(copy), strict=True)
    return list(once), [statistics.mean(clock) for clock in both], sum(t.nbytes for t in kept)


def measure(a: argparse.Namespace, arch: Architecture, what: str) -> dict[str, Any]:
    target = resolve_target(arch, TARGETS[what])
    plan = make_plan(arch, target, importance="random", source_sha256="")
    dtype = torch.bfloat16 if a.bf16 else torch.float32
    rows = [one_run(arch, plan, dtype) for _ in range(a.runs + 1)][1:]  # the first warms up
    return {
        "what": what,
        "device": models.device_name(),
        "threads": torch.get_num_threads(),
        "params_before": arch.parameters(),
        "params_after": target.parameters(),
        "dtype": str(dtype),
        "copied_gib": round(rows[0][2] / 2**30, 4),
        "copy_s": round(statistics.median(copy[0] for _, copy, _ in rows), 5),
        "prune_s": round(statistics.median(once[0] for once, *_ in rows), 5),
        "ratio": round(statistics.median(once[0] / copy[0] for once, copy, _ in rows), 4),
        "ratio_cpu_time": round(statistics.median(once[1] / copy[1] for once, copy, _ in rows), 4),
        "runs": a.runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(parser, num_layers=2, hidden_size=4096, kv_channels=128, vocab_size=8192)
    parser.add_argument("--runs", type=int, default=5)
    a = parser.parse_args()
    cpu_compat.prepare_megatron()
    models.process_group()
    for what in TARGETS:
        print(json.dumps(measure(a, models.architecture(a), what)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
