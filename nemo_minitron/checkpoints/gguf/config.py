"""What a GGUF file says of a model, as Hugging Face's config.json says it.

The keys are those that llama.cpp's own converter writes (`conversion/` of ggml-org/llama.cpp in 2026). The file keeps
numbers as float32.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nemo_minitron.checkpoints.gguf.reader import GGUFFile
from nemo_minitron.checkpoints.gguf.settings import Settings
from nemo_minitron.checkpoints.gguf.weights import numbers
from nemo_minitron.errors import InputError

# general.architecture -> Hugging Face's model_type. Mistral's files say "llama"; both compute the same.
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "nemotron": "nemotron"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "nemotron": "NemotronForCausalLM",
}
_EPSILONS = {"nemotron": (".attention.layer_norm_epsilon", "norm_eps")}
_RMS_EPSILON = (".attention.layer_norm_rms_epsilon", "rms_norm_eps")
_ACTIVATIONS = {"gemma": "gelu_pytorch_tanh", "nemotron": "relu2"}
# Keys under which a model of these architectures would compute something else than transformers' model does.
_FOREIGN = (
    (".expert_count", "experts are not converted"),
    (".attention.clamp_kqv", "is not converted"),
    (".attention.max_alibi_bias", "is not converted"),
    (".attention.scale", "is not converted"),
    (".residual_scale", "is not converted"),
    (".embedding_scale", "is not converted"),
    (".logit_scale", "is not converted"),
    (".attn_logit_softcapping", "is not converted"),
    (".final_logit_softcapping", "is not converted"),
)
_ROPE_FREQUENCIES = "rope_freqs.weight"
# Llama 3.1's, which the file does not keep: only the factors that they give.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_TOLERANCE = 1e-4


def config_json(file: GGUFFile, where: str) -> dict[str, Any]:
    """The config.json of the model, without special tokens and dtype.

    Raises:
        InputError: another architecture, a key that is missing or out of range, something that is not converted.
    """
    s = Settings(file.metadata, where)
    if s.architecture not in MODEL_TYPES:
        raise s.refuse("general.architecture", s.architecture, f"converted are {', '.join(MODEL_TYPES)}")
    for key, reason in _FOREIGN:
        if s.get(key, 0):
            raise s.refuse(key, s.get(key), reason)
    window = s.integer(".attention.sliding_window", None)
    model_type = MODEL_TYPES[s.architecture]
    if model_type == "llama" and window is not None:
        model_type = "mistral"
    epsilon, epsilon_name = _EPSILONS.get(model_type, _RMS_EPSILON)
    config = {
        "model_type": model_type,
        "architectures": [_CLASSES[model_type]],
        **_sizes(file, s),
        "max_position_embeddings": s.integer(".context_length"),
        epsilon_name: s.number(epsilon),
        "rope_theta": s.number(".rope.freq_base", 10000.0),
        "hidden_act": _ACTIVATIONS.get(model_type, "silu"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_windows(model_type, window),
    }
    rotated = s.integer(".rope.dimension_count", config["head_dim"])
    if model_type == "nemotron":
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    elif rotated != config["head_dim"]:
        raise s.refuse(".rope.dimension_count", rotated, f"must be the head dimension, {config['head_dim']}")
    scaling = _rope_scaling(file, s, config["head_dim"], config["rope_theta"])
    return {**config, "rope_scaling": scaling} if scaling else config


def _windows(model_type: str, window: int | None) -> dict[str, Any]:
    if model_type == "mistral":
        return {"sliding_window": window}
    if model_type in ("qwen2", "qwen3"):
        return {"use_sliding_window": window is not None, "sliding_window": window}
    return {}


def _sizes(file: GGUFFile, s: Settings) -> dict[str, int]:
    hidden, heads, layers = (
        s.integer(".embedding_length"),
        s.integer(".attention.head_count"),
        s.integer(".block_count"),
    )
    if layers > len(file.tensors):
        raise s.refuse(".block_count", layers, f"but there are only {len(file.tensors)} tensors")
    head_dim = s.integer(".attention.key_length", hidden // heads)
    values = s.integer(".attention.value_length", hidden // heads)
    if head_dim != values:
        raise s.refuse(".attention.value_length", values, f"must be the key_length, {head_dim}")
    if head_dim < 2 or head_dim % 2:
        raise s.refuse(".attention.key_length", head_dim, "must be even")
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise InputError(f"{s.where}: lacks the tensor token_embd.weight")
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": s.integer(".feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": s.integer(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": table.shape[0],
    }


def _rope_scaling(file: GGUFFile, s: Settings, head_dim: int, theta: float) -> dict[str, Any] | None:
    """What config.json says under rope_scaling: as the metadata name it, or found from the tensor of factors."""
    factor = s.number(".rope.scaling.factor", s.number(".rope.scale_linear", 1.0))
    kind = s.text(".rope.scaling.type", "linear")
    if kind != "none" and (kind != "linear" or factor != 1.0):
        # Refused by name where config.json is read, but for what is known there.
        return {"rope_type": kind, "factor": factor}
    if _ROPE_FREQUENCIES not in file.tensors:
        return None

    factors = numbers(file, file.tensors[_ROPE_FREQUENCIES]).astype(np.float64).ravel()
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise InputError(f"{s.where}: {_ROPE_FREQUENCIES} are not {head_dim // 2} positive factors")
    if np.allclose(factors, 1.0, atol=_TOLERANCE):
        return None
    original = s.integer(".rope.scaling.original_context_length", 8192)
    for found in _llama3_candidates(factors, head_dim, theta, original):
        if np.allclose(llama3_factors(head_dim, theta, **found), factors, rtol=_TOLERANCE):
            return {"rope_type": "llama3", **found}
    raise InputError(f"{s.where}: {_ROPE_FREQUENCIES} are not factors of Llama 3.1's scaling")


def _llama3_candidates(factors: Any, head_dim: int, theta: float, original: int) -> Iterator[dict[str, Any]]:
    """Llama 3.1's own settings, and those that a line through the factors between the two bounds gives.

    The three numbers beside the factor can be multiplied by one number, and mean the same: so the context is kept.
    """
    factor = float(f"{factors.max():.6g}")
    rest = {"factor": factor, "original_max_position_embeddings": original}
    yield {**rest, **_LLAMA3}
    between = (factors > 1 + _TOLERANCE) & (factors < factor * (1 - _TOLERANCE))
    if factor <= 1 or between.sum() < 2:
        return
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(turns[between], smooth[between], 1)
    low, width = -start / slope, 1 / slope
    if low > 0 < width:
        yield {
            **rest,
            "low_freq_factor": float(f"{low:.4g}"),
            "high_freq_factor": float(f"{low + width:.4g}"),
        }


def llama3_factors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Any:
    """What each rotary frequency is divided by: [head_dim / 2], float64.

    Source: transformers 4.51.3, `modeling_rope_utils._compute_llama3_parameters`, as quotients.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
