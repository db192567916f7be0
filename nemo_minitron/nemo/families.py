"""The model families that NeMo 2 converts from and to Hugging Face, as data: what a config.json says, and back.

For each family: NeMo's own classes (nemo_toolkit 2.4.1, `nemo.collections.llm.gpt.model`) and the part of the
architecture that is not in the sizes. Imports nothing heavy. Families that NeMo could convert but that are not in the
table have layers that this project does not score or prune (Gemma 2 and 3: further norms and soft capping; Mixtral,
DeepSeek: experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.nemo import rope


@dataclass(frozen=True)
class Family:
    """One model type of Hugging Face.

    Attributes:
        module: NeMo's, below `nemo.collections.llm.gpt.model`.
        config: NeMo's config class; `model`: its model class; `connector`: "HF<this>Importer" and "HF<this>Exporter".
        activations: `hidden_act` of a config.json that is supported, to `Architecture.activation`.
        fixed: fields of the architecture that all models of the family share.
        defaults: what transformers 4.51.3 takes where config.json leaves a key out.
        epsilon: config.json's name of the norms' epsilon.
    """

    module: str
    config: str
    model: str
    connector: str
    activations: Mapping[str, str] = field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    epsilon: str = "rms_norm_eps"


FAMILIES = {
    "llama": Family("llama", "LlamaConfig", "LlamaModel", "Llama", defaults={"num_key_value_heads": None}),
    "mistral": Family(
        "mistral",
        "MistralConfig7B",
        "MistralModel",
        "Mistral",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2Config",
        "Qwen2Model",
        "Qwen2",
        fixed={"add_qkv_bias": True},
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3Config",
        "Qwen3Model",
        "Qwen3",
        fixed={"qk_layernorm": True},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "gemma": Family(
        "gemma",
        "GemmaConfig",
        "GemmaModel",
        "Gemma",
        activations={"gelu_pytorch_tanh": "gelu_tanh"},
        fixed={"layernorm_zero_centered_gamma": True},
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "nemotron": Family(
        "nemotron",
        "NemotronConfig",
        "NemotronModel",
        "Nemotron",
        activations={"relu2": "squared_relu"},
        fixed={
            "gated_linear_unit": False,
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
        },
        defaults={
            "num_key_value_heads": None,
            "hidden_act": "relu2",
            "norm_eps": 1e-5,
        },
        epsilon="norm_eps",
    ),
}
_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Llama 3.1's scaling: the fields of `Architecture`, those of NeMo's Llama31Config (nemo_toolkit 2.4.1) and their type.
NEMO_ROPE_SCALING: tuple[tuple[str, str, type], ...] = (
    ("rope_scaling_factor", "scale_factor", float),
    ("rope_low_freq_factor", "low_freq_factor", float),
    ("rope_high_freq_factor", "high_freq_factor", float),
    ("rope_original_context", "old_context_len", int),
)


def of_nemo_model(target: str, where: str) -> str | None:
    """The family of a NeMo 2 model by the class that its context names; None for NeMo's plain GPTModel.

    Raises:
        InputError: a class that is not in the table.
    """
    prefix = "nemo.collections.llm.gpt.model."
    if target == prefix + "base.GPTModel":
        return None
    for name, family in FAMILIES.items():
        if target == f"{prefix}{family.module}.{family.model}":
            return name
    known = ", ".join(["GPTModel", *(family.model for family in FAMILIES.values())])
    raise InputError(f"{where}: NeMo model {target!r} is not supported; those are {known}")


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a Hugging Face config.json states.

    Raises:
        InputError: another model type, a missing size, something that NeMo's converted model would not honour.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{where}: model_type {name!r} is not converted; those are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    values = {**_DEFAULTS, **family.defaults, **config}
    if values["hidden_act"] not in list(family.activations):
        raise InputError(
            f"{where}: hidden_act {values['hidden_act']!r}: for {name} only "
            f"{', '.join(family.activations)} is converted"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(f"{where}: attention_bias and mlp_bias of a {name} model are not converted")
    try:
        return Architecture(**_sizes(values, family), **_rest(values, name, where), **family.fixed)
    except KeyError as error:
        raise InputError(f"{where}: config.json lacks {error}") from None
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{where}: config.json holds a value of the wrong kind ({error})") from None


def _sizes(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    return {
        "num_layers": values["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": values["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": values["num_key_value_heads"] or heads,
        "kv_channels": values["head_dim"] or hidden // heads,
        "vocab_size": values["vocab_size"],
        "layernorm_epsilon": float(values[family.epsilon]),
    }


def _rest(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    return {
        "activation": FAMILIES[name].activations[values["hidden_act"]],
        "share_embeddings_and_output_weights": bool(values["tie_word_embeddings"]),
        **rope.rope_of(values, where),
        "model_type": name,
    }


def context_of(config: Mapping[str, Any], where: str) -> int:
    """The context in tokens that a config.json of a known family allows.

    Sliding-window attention is full attention up to the window's length and is converted as such, so the window bounds
    the context.

    Raises:
        InputError: no positive integer.
    """
    values = {**FAMILIES[config["model_type"]].defaults, **config}
    found = {"max_position_embeddings": config.get("max_position_embeddings")}
    always = config["model_type"] == "mistral"
    if (always or config.get("use_sliding_window")) and values.get("sliding_window") is not None:
        found["sliding_window"] = values["sliding_window"]
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: config.json: {name}={value!r}: must be a positive integer")
    return min(found.values())


def config_of(architecture: Architecture, context: int) -> dict[str, Any]:
    """What a config.json has to say of an architecture; `head_dim` always: after pruning it is not hidden_size / heads.

    Args:
        architecture: with a `model_type`.
        context: in tokens.
    """
    a = architecture
    assert a.model_type is not None
    family = FAMILIES[a.model_type]
    values: dict[str, Any] = {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": context,
        family.epsilon: a.layernorm_epsilon,
        "tie_word_embeddings": a.share_embeddings_and_output_weights,
        "hidden_act": next(theirs for theirs, ours in family.activations.items() if ours == a.activation),
    }
    if "sliding_window" in family.defaults:
        values["sliding_window"] = None
    return values | rope.config_of(a)
