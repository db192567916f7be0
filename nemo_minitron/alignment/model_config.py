"""An `Architecture` as the configuration of NeMo 1's MegatronGPTModel, which NeMo-Aligner's models derive from."""

from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.families import FAMILIES, NEMO_ROPE_SCALING
from nemo_minitron.config.trainer import TrainerConfig

_GATED = {"silu": "fast-swiglu", "gelu": "fast-geglu", "gelu_tanh": "fast-geglu"}
_PLAIN = {"gelu": "gelu", "gelu_tanh": "gelu", "squared_relu": "squared-relu"}
# Without Transformer Engine and Apex megatron-core refuses to run with these.
_FUSIONS = (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "bias_activation_fusion",
    "bias_dropout_add_fusion",
    "apply_rope_fusion",
)


def model_config(architecture: Architecture, seq_length: int, tokenizer: str) -> dict[str, Any]:
    """What a `model_config.yaml` says of a model: its architecture, context and tokenizer, no layout and no training.

    Args:
        architecture: whose `vocab_size` is that of the weights, padding included.
        seq_length: the context in tokens.
        tokenizer: a Hugging Face directory.
    """
    a = architecture
    return {
        "mcore_gpt": True,
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "encoder_seq_length": seq_length,
        "max_position_embeddings": a.max_position_embeddings or seq_length,
        # The rows that the weights have, whatever the layout; NeMo 1 pads the tokenizer's size otherwise.
        "override_vocab_size": a.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "normalization": a.normalization.lower(),
        "layernorm_zero_centered_gamma": a.layernorm_zero_centered_gamma,
        "layernorm_epsilon": a.layernorm_epsilon,
        "qk_layernorm": a.qk_layernorm,
        "bias": a.add_bias_linear,
        "qkv_bias": a.add_qkv_bias,
        "activation": (_GATED if a.gated_linear_unit else _PLAIN)[a.activation],
        "openai_gelu": a.activation == "gelu_tanh",
        "position_embedding_type": a.position_embedding_type,
        "rotary_base": a.rotary_base,
        "rotary_percentage": a.rotary_percent,
        "share_embeddings_and_output_weights": a.share_embeddings_and_output_weights,
        "apply_embedding_scaling": a.model_type is not None and FAMILIES[a.model_type].scaled_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tokenizer": {"library": "huggingface", "type": tokenizer, "use_fast": True},
        **_rope_scaling(a),
    }


def _rope_scaling(a: Architecture) -> dict[str, Any]:
    if a.rope_scaling_factor is None:
        return {}
    # NeMo 1's names are those of NeMo 2's Llama31Config.
    scaling = {theirs: getattr(a, ours) for ours, theirs, _ in NEMO_ROPE_SCALING}
    return {"scale_positional_embedding": True, **scaling}


def run_config(t: TrainerConfig, *, cuda: bool, fused: bool) -> dict[str, Any]:
    """What else the model has to know to train under a layout on this host.

    Args:
        t: the layout.
        cuda: whether there is CUDA.
        fused: whether layers are Transformer Engine's; the local ones have none of its and Apex's fused operations.
    """
    layout = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "micro_batch_size",
        "global_batch_size",
    )
    settings: dict[str, Any] = {name: getattr(t, name) for name in layout}
    if not fused:
        settings |= dict.fromkeys(_FUSIONS, False)
    full = t.recompute_granularity == "full"
    return {
        **settings,
        "activations_checkpoint_granularity": t.recompute_granularity,
        "activations_checkpoint_method": "uniform" if full else None,
        "activations_checkpoint_num_layers": 1 if full else None,
        # Read before NeMo generates; nothing else is done with it here.
        "activations_checkpoint_layers_per_pipeline": None,
        # Without it too: `cpu_compat.aligner` gives the local spec for Transformer Engine's name.
        "transformer_engine": True,
        "use_cpu_initialization": not cuda,
        "megatron_amp_O2": cuda and t.precision.startswith("bf16"),
        "precision": t.precision,
        "get_attention_mask_from_fusion": True,
        "gradient_as_bucket_view": True,
    }
