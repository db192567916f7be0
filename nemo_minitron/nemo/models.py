"""`Architecture` to NeMo 2 models and back."""

import functools
import importlib
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from nemo.collections import llm
from nemo.collections.llm.fn.activation import openai_gelu, squared_relu
from nemo.collections.llm.gpt.model.base import HAVE_TE, local_layer_spec
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.utils import logging
from torch.nn import functional as F

from nemo_minitron import padding, parallel
from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.families import FAMILIES, NEMO_ROPE_SCALING
from nemo_minitron.environment import verbose
from nemo_minitron.errors import InputError

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": openai_gelu, "squared_relu": squared_relu}
_NAMES = {function: name for name, function in _ACTIVATIONS.items()}


def quiet_nemo() -> None:
    """Recipes show progress and results, not NeMo's list of process groups; NEMO_MINITRON_VERBOSE=1 shows that too."""
    if not verbose():
        logging.setLevel(logging.ERROR)


def host_settings() -> dict[str, Any]:
    """Config fields without which megatron-core refuses to run where Transformer Engine and Apex are missing."""
    if HAVE_TE:
        return {}
    fusions = (
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "bias_dropout_fusion",
        "bias_activation_fusion",
        "apply_rope_fusion",
        "cross_entropy_loss_fusion",
    )
    settings: dict[str, Any] = dict.fromkeys(fusions, False)
    settings |= {
        "transformer_layer_spec": local_layer_spec,
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    return settings


def to_config(architecture: Architecture, *, seq_length: int, precision: str = "32") -> "llm.GPTConfig":
    """The NeMo config of an architecture, fit for this host.

    `vocab_size` is set, so that every layout has, and every checkpoint's context names, the same rows. The models that
    it makes have more where the tensor-parallel size does not divide them, see `padding`.
    """
    a = architecture
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    config = _config_class(a)(
        **a.to_megatron(),
        make_vocab_size_divisible_by=1,
        seq_length=seq_length,
        activation_func=_ACTIVATIONS[a.activation],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **_family_settings(a),
        **host_settings(),
    )
    config.configure_model = functools.partial(_configure_padded, config)
    return config


def _configure_padded(config: Any, *arguments: Any, **options: Any) -> Any:
    """`GPTConfig.configure_model` of a vocabulary that the tensor-parallel size need not divide."""
    vocab_size = config.vocab_size
    # As an argument of the model only: the config's own is saved, and is the architecture's.
    config.vocab_size = padding.padded_rows(vocab_size, parallel.tp_size())
    try:
        model = type(config).configure_model(config, *arguments, **options)
    finally:
        config.vocab_size = vocab_size
    padding.leave_out_padding(model, vocab_size)
    return model


def nemo_class(model_type: str, name: str) -> Any:
    """A class of the module in which NeMo has this family."""
    return getattr(
        importlib.import_module(f"nemo.collections.llm.gpt.model.{FAMILIES[model_type].module}"), name
    )


def _config_class(architecture: Architecture) -> Any:
    if architecture.model_type is None:
        found = llm.GPTConfig
    elif architecture.rope_scaling_factor is not None:
        found = Llama31Config
    else:
        found = nemo_class(architecture.model_type, FAMILIES[architecture.model_type].config)
    # NeMo records a config's arguments, for the saved context, by wrapping __init__ once, and takes a parent that is
    # wrapped already for the class itself (_io_wrap_init, nemo_toolkit 2.4.1): after a Qwen2Config no Qwen3Config.
    if "__wrapped_init__" not in vars(found):
        found.__wrapped_init__ = False
    return found


def _family_settings(architecture: Architecture) -> dict[str, Any]:
    """What NeMo's config class of the family sets and this project does not want, or wants otherwise."""
    if architecture.rope_scaling_factor is not None:
        return {theirs: getattr(architecture, ours) for ours, theirs, _ in NEMO_ROPE_SCALING}
    settings = dict(FAMILIES[architecture.model_type].nemo) if architecture.model_type else {}
    if "attention_backend" in settings:
        settings["attention_backend"] = AttnBackend[settings["attention_backend"]]
    return settings


def from_config(config: Any, vocab_size: int | None = None) -> Architecture:
    """The architecture of a NeMo or Megatron-core config.

    Args:
        config: a `TransformerConfig` with NeMo's GPT fields.
        vocab_size: where the config leaves it open (NeMo then takes the tokenizer's).

    Raises:
        InputError: a model that this project does not prune (experts, an unknown activation).
    """
    if getattr(config, "num_moe_experts", None):
        raise InputError(f"num_moe_experts={config.num_moe_experts}: only dense models are supported")
    if config.activation_func not in _NAMES:
        raise InputError(f"activation {config.activation_func!r}: known are {', '.join(_ACTIVATIONS)}")
    return Architecture.from_megatron(
        vars(config) | {"vocab_size": config.vocab_size or vocab_size},
        activation=_NAMES[config.activation_func],
        model_type=_model_type(config),
        **_rope_scaling(config),
    )


def _rope_scaling(config: Any) -> dict[str, Any]:
    if not isinstance(config, Llama31Config):
        return {}
    return {ours: kind(getattr(config, theirs)) for ours, theirs, kind in NEMO_ROPE_SCALING}


def _model_type(config: Any) -> str | None:
    """The family of a config's class, or of the nearest one that it derives from (Qwen3Config is a Qwen2Config)."""
    by_class = {family.config: name for name, family in FAMILIES.items()}
    return next((by_class[c.__name__] for c in type(config).__mro__ if c.__name__ in by_class), None)


def to_model(config: "llm.GPTConfig", tokenizer: Any, optim: Any = None) -> "llm.GPTModel":
    """The NeMo model of a config, of its family's class: Gemma's scales the embeddings, and NeMo's own exporters go by
    the class."""
    model_type = _model_type(config)
    model: Any = llm.GPTModel if model_type is None else nemo_class(model_type, FAMILIES[model_type].model)
    return model(config, optim=optim, tokenizer=tokenizer)
