"""Random weights as NeMo 2 stacks and fuses them, in a distributed checkpoint that torch itself writes."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.families import FAMILIES
from nemo_minitron.export.distributed_reader import DistributedReader

# head_dim is not hidden_size / heads.
ARCH = Architecture(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    model_type="llama",
)


def of_family(name: str, **sizes: Any) -> Architecture:
    """A small architecture of one of the six families."""
    family = FAMILIES[name]
    return ARCH.replace(
        model_type=name,
        activation=next(iter(family.activations.values())),
        **{
            **family.fixed,
            "share_embeddings_and_output_weights": name == "gemma",
            "rotary_percent": 0.5 if name == "nemotron" else 1.0,
            **sizes,
        },
    )


def stacked(a: Architecture, rows: int | None = None, seed: int = 5) -> dict[str, Tensor]:
    """Weights under Megatron's names, float32.

    Args:
        rows: of the embeddings, those that pad the vocabulary included.
    """
    h, layers, rows = a.hidden_size, a.num_layers, rows or a.vocab_size
    qkv, fc1 = a.query_size + 2 * a.key_value_size, a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (rows, h),
        "decoder.final_layernorm.weight": (h,),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, h),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, qkv, h),
        "decoder.layers.self_attention.linear_proj.weight": (layers, h, a.query_size),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, h),
        "decoder.layers.mlp.linear_fc1.weight": (layers, fc1, h),
        "decoder.layers.mlp.linear_fc2.weight": (layers, h, a.ffn_hidden_size),
    }
    if not a.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (rows, h)
    if a.add_qkv_bias:
        shapes["decoder.layers.self_attention.linear_qkv.bias"] = (layers, qkv)
    if a.qk_layernorm:
        for part in ("q", "k"):
            shapes[f"decoder.layers.self_attention.{part}_layernorm.weight"] = (layers, a.kv_channels)
    if a.normalization == "LayerNorm":
        shapes |= {k.replace("norm_weight", "norm_bias"): v for k, v in shapes.items() if "norm_weight" in k}
        shapes["decoder.final_layernorm.bias"] = (h,)
    generator = torch.Generator().manual_seed(seed)
    return {
        f"module.{name}": torch.randn(shape, generator=generator) * (0.3 if "norm" not in name else 0.5)
        + (1.0 if "norm" in name and "weight" in name and not a.layernorm_zero_centered_gamma else 0.0)
        for name, shape in shapes.items()
    }


def saved(directory: Path, tensors: dict[str, Tensor]) -> DistributedReader:
    """What reads them again."""
    dcp.save(tensors, checkpoint_id=directory, no_dist=True)
    return DistributedReader(directory, dcp.FileSystemReader(directory).read_metadata())


def word_tokenizer(directory: Path, vocab_size: int) -> Path:
    """A tokenizer of as many words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<eod>": 0, **{f"w{i}": i for i in range(1, vocab_size)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eod>")),
        eos_token="<eod>",
        bos_token="<eod>",
        unk_token="<eod>",
    ).save_pretrained(directory)
    return directory
