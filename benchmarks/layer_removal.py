"""What scoring all single-layer removals costs, against a full pass for each: python benchmarks/layer_removal.py

Builds a Megatron GPT (one process, random weights), takes the time of a full forward pass with its loss and of
`LayerRemoval` over all layers, on the same microbatch, and prints a JSON line: medians over runs in seconds, the head's
share of the FLOPs, and

    ratio = seconds of all L removals (the one full pass that they start from included) / (L x seconds of a full pass)

the median over runs, each of which times full passes right before and right after its removals. On a CPU that other
processes use too, `ratio_cpu_time` is the steadier one: it leaves out the time in which they had the CPU.

With a head of share p, counting FLOPs gives ((1 - p) (L - 1) / 2 + p L + 1) / L: 0.57 for L = 24 and p = 0.1. The
goal is 0.6 for L >= 24 and p <= 0.1.
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
from nemo_minitron.evaluation.layer_removal import LayerRemoval
from nemo_minitron.evaluation.lm_loss import evaluating


def measure(a: argparse.Namespace) -> dict[str, Any]:
    arch = models.architecture(a)
    models.process_group()
    gpt = models.gpt(arch, torch.bfloat16 if a.bf16 else torch.float32)
    batch = models.random_batch(arch.vocab_size, a.micro_batch_size, a.seq_length)
    full, removals = [], []
    with evaluating([gpt]), LayerRemoval([gpt], [(i, 1) for i in range(arch.num_layers)]) as removal:

        def one_pass() -> None:
            gpt(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        for run in range(a.runs + 1):  # the first warms up
            passes = [models.seconds(one_pass) for _ in range(a.passes)]
            once = models.seconds(lambda: removal.losses(batch))
            passes += [models.seconds(one_pass) for _ in range(a.passes)]
            if run:
                full.append([statistics.median(clock) for clock in zip(*passes, strict=True)])
                removals.append(once)
    head = 2 * arch.vocab_size * arch.hidden_size / arch.flops_per_token(a.seq_length)
    layers = arch.num_layers
    wall, cpu = (
        statistics.median(r[clock] / (layers * f[clock]) for r, f in zip(removals, full, strict=True))
        for clock in (0, 1)
    )
    return {
        "device": models.device_name(),
        "layers": layers,
        "head_share_of_flops": round(head, 4),
        "full_pass_s": round(statistics.median(f for f, _ in full), 5),
        "all_removals_s": round(statistics.median(r for r, _ in removals), 5),
        "ratio": round(wall, 4),
        "ratio_cpu_time": round(cpu, 4),
        "ratio_by_flops": round(((1 - head) * (layers - 1) / 2 + head * layers + 1) / layers, 4),
        "runs": a.runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(
        parser,
        num_layers=24,
        hidden_size=256,
        kv_channels=32,
        vocab_size=8192,
        seq_length=256,
        micro_batch_size=2,
    )
    parser.add_argument("--passes", type=int, default=5, help="full passes timed in each run")
    parser.add_argument("--runs", type=int, default=5)
    cpu_compat.prepare_megatron()
    print(json.dumps(measure(parser.parse_args())))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
