"""What the benchmarks share: a Megatron GPT of any size in one process, random text for it, and clocks."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.arch import Architecture


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options for the model and the microbatch, one for each default given, and --bf16."""
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def architecture(a: argparse.Namespace) -> Architecture:
    """Llama's proportions."""
    heads = a.hidden_size // a.kv_channels
    ffn = a.hidden_size * 8 // 3 // 16 * 16
    return Architecture(
        a.num_layers, a.hidden_size, ffn, heads, max(1, heads // 4), a.kv_channels, a.vocab_size
    )


def process_group(rank: int = 0, ranks: int = 1, directory: str | None = None) -> None:
    """Megatron's groups, all ranks tensor-parallel; more than one meet in an empty directory."""
    from megatron.core import parallel_state, tensor_parallel

    store = torch.distributed.FileStore(f"{directory or tempfile.mkdtemp()}/store", ranks)
    backend = "nccl" if device().type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def gpt(arch: Architecture, dtype: torch.dtype = torch.float32, *, initialised: bool = True) -> Any:
    """Megatron's GPTModel with its own initialisation, or with ones where only sizes matter."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    config = TransformerConfig(
        **{name: getattr(arch, name) for name in (*sizes, "kv_channels")},
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        layernorm_epsilon=arch.layernorm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=initialised,
        bf16=dtype == torch.bfloat16,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=arch.vocab_size,
        max_sequence_length=8192,
        position_embedding_type="rope",
        rotary_base=int(arch.rotary_base),
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
    ).to(device=device(), dtype=dtype)
    if not initialised:
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
    return model


def random_batch(vocab_size: int, samples: int, seq_length: int) -> dict[str, torch.Tensor]:
    """A microbatch as GPTDataset's: tokens, labels and position_ids int64 [b, s], loss_mask float32 [b, s]."""
    # Drawn on the CPU, so that a GPU works on the same tokens.
    text = torch.randint(vocab_size, (samples, seq_length + 1)).to(device())
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": torch.arange(seq_length, device=device()).expand(samples, seq_length),
        "loss_mask": torch.ones(samples, seq_length, device=device()),
    }


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """By the clock on the wall, and of this process on the CPU."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter(), time.process_time()
    work()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def device_name() -> str:
    """The GPU's name, or the processor's as Linux gives it."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
