"""What scoring costs beside the plain forward passes over the same samples: python benchmarks/scoring.py

Builds a Megatron GPT (one process, random weights), and takes the time of

* plain passes: forward, without gradients, with the output layer and the loss, as every evaluation makes them;
* scoring: the very same calls inside `ImportanceCollector` on all width axes and `BlockInfluenceCollector` on single
  layers, from the making of the collectors to their `finish`.

Prints a JSON line: medians over runs in seconds and

    ratio = seconds of scoring / seconds of the plain passes over the same microbatches

the median over runs, each of which times half of its plain passes right before and half right after its scoring. On a
CPU that other processes use too, `ratio_cpu_time` is the steadier one: it leaves out the time they had the CPU for.
The output layer is in both sides; `head_share_of_flops` says how much of the plain side it is.

What a token costs to score grows with the layers' widths, what it costs to compute with their product, so the ratio
falls as models grow. The goal is 1.15. --source DIR takes the sizes of a checkpoint, the weights stay random:

    python benchmarks/scoring.py --source assets/demo-teacher --micro-batch-size 8
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
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.evaluation.lm_loss import evaluating
from nemo_minitron.importance.aggregation import STATISTICS
from nemo_minitron.importance.block_influence import BlockInfluenceCollector
from nemo_minitron.importance.collectors import ImportanceCollector


def measure(a: argparse.Namespace, arch: Architecture) -> dict[str, Any]:
    models.process_group()
    gpt = models.gpt(arch, torch.bfloat16 if a.bf16 else torch.float32)
    batches = [
        models.random_batch(arch.vocab_size, a.micro_batch_size, a.seq_length) for _ in range(2 * a.half)
    ]

    def passes(some: list[dict[str, torch.Tensor]]) -> None:
        for batch in some:
            gpt(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def scoring() -> None:
        widths = ImportanceCollector([gpt], batch=a.batch, sequence=a.sequence)
        with widths, BlockInfluenceCollector([gpt]) as layers:
            passes(batches)
        widths.finish(), layers.finish()

    plain, scored = [], []
    with evaluating([gpt]):
        for run in range(a.runs + 1):  # the first warms up
            before = models.seconds(lambda: passes(batches[: a.half]))
            once = models.seconds(scoring)
            after = models.seconds(lambda: passes(batches[a.half :]))
            if run:
                plain.append([sum(halves) for halves in zip(before, after, strict=True)])
                scored.append(once)
    ratios = [[s / p for s, p in zip(*both, strict=True)] for both in zip(scored, plain, strict=True)]
    return {
        "device": models.device_name(),
        "threads": torch.get_num_threads(),
        **{
            name: getattr(arch, name)
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size")
        },
        "seq_length": a.seq_length,
        "micro_batch_size": a.micro_batch_size,
        "microbatches": len(batches),
        "aggregation": f"{a.batch}, {a.sequence}",
        "head_share_of_flops": round(
            2 * arch.vocab_size * arch.hidden_size / arch.flops_per_token(a.seq_length), 4
        ),
        "plain_s": round(statistics.median(wall for wall, _ in plain), 5),
        "scoring_s": round(statistics.median(wall for wall, _ in scored), 5),
        "ratio": round(statistics.median(wall for wall, _ in ratios), 4),
        "ratio_cpu_time": round(statistics.median(cpu for _, cpu in ratios), 4),
        "runs": a.runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(
        parser,
        num_layers=4,
        hidden_size=768,
        kv_channels=64,
        vocab_size=8192,
        seq_length=512,
        micro_batch_size=2,
    )
    parser.add_argument("--source", help="a checkpoint directory; its sizes instead of the options'")
    parser.add_argument("--batch", choices=STATISTICS, default="l2")
    parser.add_argument("--sequence", choices=STATISTICS, default="mean")
    parser.add_argument("--half", type=int, default=2, help="half of the microbatches of a run")
    parser.add_argument("--runs", type=int, default=7)
    a = parser.parse_args()
    arch = find_source(a.source).architecture if a.source else models.architecture(a)
    cpu_compat.prepare_megatron()
    print(json.dumps(measure(a, arch)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
