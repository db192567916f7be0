"""Random transformers models of every family that NeMo converts, and their pruning by plain indexing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.stacked_weights import word_tokenizer

VOCAB_SIZE, CONTEXT = 64, 32
# As after pruning: head_dim is not hidden_size / heads.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
# Every family once with and once without tied embeddings, where NeMo knows both.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "nemotron": {"model_type": "nemotron"},
}


def make_model(directory: Path, name: str, **changes: Any) -> Any:
    """transformers' model, saved with a tokenizer; norms and biases are not at their trivial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**_COMMON, **CONFIGS[name], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.rand_like(parameter) - 0.5)
    model.save_pretrained(directory)
    word_tokenizer(directory, VOCAB_SIZE)
    return model


def cut(source: Any, plan: Any) -> Any:
    """The pruned model as transformers' own, made of the source's weights by plain indexing."""
    from transformers import AutoModelForCausalLM

    config, target, kept = type(source.config)(**source.config.to_dict()), plan.target, plan.kept
    config.hidden_size, config.intermediate_size = target.hidden_size, target.ffn_hidden_size
    config.num_attention_heads, config.num_key_value_heads = (
        target.num_attention_heads,
        target.num_query_groups,
    )
    config.num_hidden_layers, config.head_dim = target.num_layers, target.kv_channels
    student = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    thin = {}
    for name, weight in source.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer is not None:
            if layer not in kept.layers:
                continue
            new = kept.layers.index(layer)
            name = name.replace(f"layers.{layer}.", f"layers.{new}.")
            weight = _units(name, weight, plan, new)
        thin[name] = _hidden(name, weight, torch.tensor(kept.hidden_size))
    student.load_state_dict(thin)
    return student


def _units(name: str, weight: Tensor, plan: Any, layer: int) -> Tensor:
    neurons = torch.tensor(plan.kept.ffn_hidden_size[layer])
    d = torch.arange(plan.source.kv_channels)
    heads, groups = (
        (torch.tensor(kept[layer])[:, None] * len(d) + d).flatten()
        for kept in (plan.kept.num_attention_heads, plan.kept.num_query_groups)
    )
    if "gate_proj" in name or "up_proj" in name:
        return weight[neurons]
    if "down_proj" in name:
        return weight[:, neurons]
    if "q_proj" in name:
        return weight[heads]
    if "k_proj" in name or "v_proj" in name:
        return weight[groups]
    return weight[:, heads] if "o_proj" in name else weight


def _hidden(name: str, weight: Tensor, channels: Tensor) -> Tensor:
    if "q_norm" in name or "k_norm" in name or name.endswith("_proj.bias"):
        return weight
    writes = any(part in name for part in ("o_proj", "down_proj", "norm"))
    return weight[channels] if writes else weight[:, channels]
