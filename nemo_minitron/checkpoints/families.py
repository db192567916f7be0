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
from nemo_minitron.checkpoints import rope
from nemo_minitron.checkpoints.config_keys import check_keys
from nemo_minitron.checkpoints.config_values import positive_integer, positive_number, short
from nemo_minitron.errors import InputError

GEMMA_ACTIVATION = "gelu_pytorch_tanh"


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
        nemo: fields of NeMo's config class that it sets, and that are wanted otherwise here.
        scaled_embeddings: whether embeddings are multiplied by sqrt(hidden_size).
        slides: whether transformers gives all layers the window of `sliding_window`, asked or not.
        activation_keys: config.json's, in the order in which they are read.
    """

    module: str
    config: str
    model: str
    connector: str
    activations: Mapping[str, str] = field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    epsilon: str = "rms_norm_eps"
    nemo: Mapping[str, Any] = field(default_factory=dict)
    scaled_embeddings: bool = False
    slides: bool = False
    activation_keys: tuple[str, ...] = ("hidden_act",)


FAMILIES = {
    "llama": Family("llama", "LlamaConfig", "LlamaModel", "Llama", defaults={"num_key_value_heads": None}),
    "mistral": Family(
        "mistral",
        "MistralConfig7B",
        "MistralModel",
        "Mistral",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        # The context is bounded by the window instead, see `context_of`.
        nemo={"window_size": None, "cp_comm_type": None},
        slides=True,
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
        activations={GEMMA_ACTIVATION: "gelu_tanh", "gelu": "gelu_tanh"},
        fixed={"layernorm_zero_centered_gamma": True},
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_act": GEMMA_ACTIVATION,
        },
        # NeMo's "flash" is for Transformer Engine 1.8, and megatron-core keeps it for the process: any other model in
        # it is then refused.
        nemo={"attention_backend": "auto"},
        scaled_embeddings=True,
        activation_keys=("hidden_act", "hidden_activation"),
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
        InputError: another model type, a missing size, a number out of its range, something that NeMo's converted
            model would not honour.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{where}: model_type {short(name)} is not converted; those are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    check_keys(config, where)
    values = {**_DEFAULTS, **family.defaults, **config}
    try:
        return Architecture(**_sizes(values, family, where), **_rest(values, name, where), **family.fixed)
    except KeyError as error:
        raise InputError(f"{where}: config.json lacks {error}") from None


def _sizes(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    def size(key: str) -> int:
        return positive_integer(values[key], key, where)

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    derived = "head_dim" not in family.defaults and values["head_dim"] is None
    if derived and hidden < heads:
        raise InputError(
            f"{where}: config.json: hidden_size={hidden}: must be at least num_attention_heads={heads}"
        )
    return {
        "num_layers": size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": heads if values["num_key_value_heads"] is None else size("num_key_value_heads"),
        "kv_channels": hidden // heads if derived else size("head_dim"),
        "vocab_size": size("vocab_size"),
        "layernorm_epsilon": positive_number(values[family.epsilon], family.epsilon, where),
    }


def _rest(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    tied = values["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise InputError(f"{where}: config.json: tie_word_embeddings={short(tied)}: must be true or false")
    return {
        "activation": _activation(values, name, where),
        "share_embeddings_and_output_weights": tied,
        **rope.rope_of(values, where),
        "model_type": name,
    }


def _activation(values: Mapping[str, Any], name: str, where: str) -> str:
    """Gemma has two keys: `hidden_act` is "gelu" in what was published first and meant the tanh approximation already
    (huggingface/transformers#29402); `hidden_activation` came with that correction and went again."""
    known = FAMILIES[name].activations
    for key in FAMILIES[name].activation_keys:
        value = values.get(key)
        if key == "hidden_activation" and value in (None, GEMMA_ACTIVATION):
            continue
        if key == "hidden_activation" or not isinstance(value, str) or value not in known:
            legal = GEMMA_ACTIVATION if key == "hidden_activation" else ", ".join(known)
            raise InputError(f"{where}: {key} {short(value)}: for {name} only {legal} is converted")
    return known[values["hidden_act"]]


def context_of(config: Mapping[str, Any], where: str) -> int:
    """The context in tokens that a config.json of a known family allows.

    Sliding-window attention is full attention up to the window's length and is converted as such, so the window bounds
    the context, whatever layers have it.

    Raises:
        InputError: no positive integer, or layer types other than full and sliding attention.
    """
    values = {**FAMILIES[config["model_type"]].defaults, **config}
    context = positive_integer(config.get("max_position_embeddings"), "max_position_embeddings", where)
    slides = _slides(values, where)
    flag = values.get("use_sliding_window")
    if flag is not None and not isinstance(flag, bool):
        raise InputError(f"{where}: config.json: use_sliding_window={short(flag)}: must be true or false")
    # 4.51.3's mask gives the window to all layers of a Qwen model too, where it is asked for.
    if FAMILIES[config["model_type"]].slides or flag or slides:
        window = values.get("sliding_window")
        if window is None and slides:
            raise InputError(
                f"{where}: config.json: layer_types names sliding_attention, but sliding_window is null"
            )
        return context if window is None else min(context, positive_integer(window, "sliding_window", where))
    return context


def _slides(values: Mapping[str, Any], where: str) -> bool:
    """Whether `layer_types` gives a layer a window."""
    types, layers = values.get("layer_types"), values["num_hidden_layers"]
    if types is None:
        return False
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{where}: config.json: layer_types={short(types)}: must list {layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(
                f"{where}: config.json: layer_types: {short(kind)} is not converted; full_attention and "
                "sliding_attention are"
            )
    return "sliding_attention" in types


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
    }
    activation = next(theirs for theirs, ours in family.activations.items() if ours == a.activation)
    values |= dict.fromkeys(family.activation_keys, activation)
    if "sliding_window" in family.defaults:
        values["sliding_window"] = None
    return values | rope.config_of(a)
