"""The architecture of a GPT as data: sizes, legality, parameter and FLOP counts. Imports nothing heavy."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.axes import WIDTH_AXES
from nemo_minitron.errors import InputError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "squared_relu")
# What is more is a mistake: a 32-bit index reaches no further.
LARGEST_SIZE = 2**31 - 1
# Fields that NeMo 2's GPT configs, which are Megatron-core's TransformerConfig, have under the same name.
MEGATRON_FIELDS = (
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ),
    *("vocab_size", "normalization", "gated_linear_unit", "share_embeddings_and_output_weights"),
    *("add_bias_linear", "add_qkv_bias", "position_embedding_type", "layernorm_epsilon"),
    *("layernorm_zero_centered_gamma", "rotary_base", "rotary_percent", "qk_layernorm"),
)
_POSITIVE = (
    *("layernorm_epsilon", "rotary_base", "rotary_percent", "rope_scaling_factor", "rope_low_freq_factor"),
    *("rope_high_freq_factor", "rope_original_context"),
)


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only GPT in Megatron-core's terms; sizes are global, never a rank's own.

    `kv_channels` is the head dimension and is carried on its own: it stays when `hidden_size` is pruned.
    `activation` is one of `ACTIVATIONS`. `rope_scaling_factor` is Llama 3.1's, None without scaling; the three fields
    after it belong to it (wavelengths over `rope_original_context / rope_low_freq_factor` tokens are scaled, those
    under `rope_original_context / rope_high_freq_factor` are not) and keep their defaults without it. `model_type`: the
    family in Hugging Face's word, for models that NeMo converts (`nemo.families`); "gemma" also says that embeddings
    are multiplied by sqrt(hidden_size).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    gated_linear_unit: bool = True
    normalization: str = "RMSNorm"
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    position_embedding_type: str = "rope"
    max_position_embeddings: int = 0
    activation: str = "silu"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling_factor: float | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192
    qk_layernorm: bool = False
    model_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", *WIDTH_AXES, "kv_channels", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
                raise InputError(f"{name}={value!r:.60}: must be a positive integer")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise InputError(f"{name}={value!r:.60}: must be a positive, finite number")
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise InputError(f"{field.name}={getattr(self, field.name)!r}: must be true or false")
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation={self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Architecture":
        """Inverse of `to_dict`; unknown keys are refused.

        Raises:
            InputError: an unknown or missing key, an illegal size.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"architecture: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"architecture: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_megatron(cls, values: Mapping[str, Any], **own: Any) -> "Architecture":
        """The architecture of a NeMo 2 config.

        Args:
            values: the config's fields, with what Megatron-core leaves open: `num_query_groups` and `kv_channels`; with
                `seq_length`, which learned positions have as many of.
            own: fields that have no namesake there.

        Raises:
            InputError: an illegal size.
            KeyError: a field is missing.
        """
        fields = {
            name: values[name] for name in MEGATRON_FIELDS if name not in ("num_query_groups", "kv_channels")
        }
        heads = fields["num_attention_heads"]
        fields["num_query_groups"] = values.get("num_query_groups") or heads
        fields["kv_channels"] = values.get("kv_channels") or fields["hidden_size"] // heads
        for name in ("layernorm_epsilon", "rotary_base"):
            fields[name] = float(fields[name])
        learned = fields["position_embedding_type"] == "learned_absolute"
        return cls(**fields, max_position_embeddings=values["seq_length"] if learned else 0, **own)

    def to_megatron(self) -> dict[str, Any]:
        """The fields that a NeMo 2 config has under the same name."""
        return {name: getattr(self, name) for name in MEGATRON_FIELDS}

    def replace(self, **sizes: Any) -> "Architecture":
        """The same architecture with other sizes.

        Raises:
            InputError: an illegal size.
        """
        return dataclasses.replace(self, **sizes)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def query_size(self) -> int:
        """Width of the attention output before its projection: heads x kv_channels, not hidden_size."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Width of all keys (or all values) of a token."""
        return self.num_query_groups * self.kv_channels

    def layer_parameters(self) -> int:
        """Weights and biases of one transformer layer."""
        h, f = self.hidden_size, self.ffn_hidden_size
        qkv = self.query_size + 2 * self.key_value_size
        fc1 = f * (2 if self.gated_linear_unit else 1)
        weights = h * qkv + self.query_size * h + h * fc1 + f * h
        norms = 2 * h * self._norm_vectors + self._qk_norms
        linear_bias = (h + fc1 + h) if self.add_bias_linear else 0
        qkv_bias = qkv if self.add_bias_linear or self.add_qkv_bias else 0
        return weights + norms + linear_bias + qkv_bias

    def non_embedding_parameters(self) -> int:
        """Parameters without token and position embeddings and without the output layer."""
        return self.num_layers * self.layer_parameters() + self.hidden_size * self._norm_vectors

    def parameters(self) -> int:
        """All parameters; a tied output layer counts once. The vocabulary is the true one, without padding."""
        tables = 1 if self.share_embeddings_and_output_weights else 2
        positions = self.max_position_embeddings if self.position_embedding_type == "learned_absolute" else 0
        return self.non_embedding_parameters() + (tables * self.vocab_size + positions) * self.hidden_size

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of one forward pass per token (2 per multiply-add), causal attention counted in full, head included."""
        norms = 2 * self.hidden_size * self._norm_vectors + self._qk_norms
        matrices = self.num_layers * (self.layer_parameters() - norms)
        attention = 2 * self.num_layers * sequence_length * self.query_size
        return 2 * (matrices + attention + self.vocab_size * self.hidden_size)

    @property
    def _qk_norms(self) -> int:
        """Parameters of the norms over a head's query and key channels, which all heads share."""
        return 2 * self.kv_channels * self._norm_vectors if self.qk_layernorm else 0

    def key_value_cache_values(self, context: int) -> int:
        """Keys and values (not bytes) that generation keeps for one sequence of `context` tokens."""
        return 2 * self.num_layers * self.key_value_size * context

    @property
    def _norm_vectors(self) -> int:
        return 2 if self.normalization == "LayerNorm" else 1
