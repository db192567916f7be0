"""Which keys of a config.json are read, which change nothing here, and which would change the model and are refused.

Gathered from the model and configuration code of the six families in transformers 4.51.3 and 5.24.0.
"""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.checkpoints.config_values import short
from nemo_minitron.errors import InputError

_READ = {
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
    *("hidden_act", "rms_norm_eps", "norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", "layer_types", "sliding_window", "use_sliding_window", "quantization_config"),
}
# About the file, training from scratch, other tasks, how a forward pass is computed, and generation.
_HARMLESS = {
    *(
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "tokenizer_class",
        "use_cache",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
    *("initializer_range", "pretraining_tp", "max_window_layers", "finetuning_task", "task_specific_params"),
    *("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "output_attentions"),
    *("output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss", "is_decoder"),
    *(
        "chunk_size_feed_forward",
        "attn_implementation",
        "cache_implementation",
        "unsloth_fixed",
        "unsloth_version",
    ),
    *(
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ),
    *(
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "repetition_penalty",
        "length_penalty",
        "name_or_path",
    ),
    *(
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "early_stopping",
        "suppress_tokens",
    ),
    *(
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "diversity_penalty",
    ),
    *(
        "output_scores",
        "return_dict_in_generate",
        "exponential_decay_length_penalty",
        "tie_last_hidden_states",
    ),
    *("hidden_activation", "attention_bias", "mlp_bias", "attention_dropout", "hidden_dropout"),
}
# Read by the model code of at least one of the families and not by what NeMo makes of them.
_REFUSED = (
    *("attention_bias", "mlp_bias", "use_bidirectional_attention", "per_layer_config", "pruned_heads"),
    *("is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
)


def check_keys(config: Mapping[str, Any], where: str) -> list[str]:
    """Refuse what a converted model would not honour.

    Args:
        config: a config.json of a known `model_type`.

    Returns:
        What else it holds that is not read: keys, sorted, some with what that means.

    Raises:
        InputError: names the key and its value.
    """
    name = config["model_type"]
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            kind = config[key].get("quant_method") if isinstance(config[key], Mapping) else config[key]
            raise InputError(
                f"{where}: {key} (quant_method {short(kind)}): quantised weights are not read; take the model that "
                "they were made from"
            )
    for key in _REFUSED:
        # Qwen2 has its biases whatever this says: its model code does not look at the key.
        if config.get(key) and (name, key) != ("qwen2", "attention_bias"):
            raise InputError(f"{where}: {key}={short(config[key])}: is not converted for a {name} model")
    unknown = [
        key for key in config if key not in _READ | _HARMLESS | set(_REFUSED) and not key.startswith("_")
    ]
    if name != "gemma" and config.get("hidden_activation") is not None:
        unknown.append("hidden_activation")
    for key in ("attention_dropout", "hidden_dropout"):
        if config.get(key):
            unknown.append(f"{key}={short(config[key])} (training here is without)")
    return sorted(unknown)
