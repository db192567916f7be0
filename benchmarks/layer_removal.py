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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nemo_minitron import hosts
from nemo_minitron.arch import Architecture
from nemo_minitron.evaluation.layer_removal import LayerRemoval
from nemo_minitron.evaluation.lm_loss import evaluating


def architecture(a: argparse.Namespace) -> Architecture:
    heads = a.hidden_size // a.kv_channels
    ffn = a.hidden_size * 8 // 3 // 16 * 16
    return Architecture(
        a.num_layers, a.hidden_size, ffn, heads, max(1, heads // 4), a.kv_channels, a.vocab_size
    )


def model(arch: Architecture, device: torch.device, dtype: torch.dtype) -> Any:
    """Megatron's GPTModel with its own initialisation, on a process group of one."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    store = torch.distributed.FileStore(f"{tempfile.mkdtemp()}/store", 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    config = TransformerConfig(
        **{name: getattr(arch, name) for name in (*sizes, "kv_channels")},
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=arch.vocab_size,
        max_sequence_length=4096,
        position_embedding_type="rope",
    ).to(device=device, dtype=dtype)


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """By the clock on the wall, and of this process on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def measure(a: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = architecture(a)
    gpt = model(arch, device, torch.bfloat16 if a.bf16 else torch.float32)
    text = torch.randint(arch.vocab_size, (a.micro_batch_size, a.seq_length + 1), device=device)
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": torch.arange(a.seq_length, device=device).expand(len(text), a.seq_length),
        "loss_mask": torch.ones(len(text), a.seq_length, device=device),
    }
    full, removals = [], []
    with evaluating([gpt]), LayerRemoval([gpt], [(i, 1) for i in range(arch.num_layers)]) as removal:

        def one_pass() -> None:
            gpt(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        for run in range(a.runs + 1):  # the first warms up
            passes = [seconds(one_pass, device) for _ in range(a.passes)]
            once = seconds(lambda: removal.losses(batch), device)
            passes += [seconds(one_pass, device) for _ in range(a.passes)]
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
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
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
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--kv-channels", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5, help="full passes timed in each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    hosts.prepare_megatron()
    print(json.dumps(measure(parser.parse_args())))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
