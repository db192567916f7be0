"""Hugging Face checkpoints in and out, on NeMo's own importer and exporter for Llama (nemo_toolkit 2.4.1)."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from nemo_minitron.nemo.checkpoints import Source

# How a converted checkpoint is laid out; part of the cache's key.
_FORMAT = 1


def architecture_of(config: dict[str, Any], where: str) -> Architecture:
    """The architecture that a Hugging Face config.json states.

    Raises:
        InputError: another model type than Llama, a missing size, a rotary scaling that NeMo does not know.
    """
    if config.get("model_type") != "llama":
        raise InputError(f"{where}: model_type {config.get('model_type')!r}: only 'llama' is converted")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act {activation!r}: only 'silu' is converted")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(f"{where}: biases in a Llama model are not converted")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            layernorm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rotary_base=float(config.get("rope_theta", 10000.0)),
            rope_scaling_factor=_rope_scaling_factor(config.get("rope_scaling"), where),
        )
    except KeyError as error:
        raise InputError(f"{where}: config.json lacks {error}") from None
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{where}: config.json holds a value of the wrong kind ({error})") from None


# What NeMo's Llama31Config (nemo_toolkit 2.4.1) has fixed.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope_scaling_factor(scaling: dict[str, Any] | None, where: str) -> float | None:
    if not scaling:
        return None
    if scaling.get("rope_type") != "llama3":
        raise InputError(f"{where}: rope_scaling {scaling.get('rope_type')!r}: only 'llama3' is known")
    for name, value in LLAMA3_SCALING.items():
        if scaling.get(name, value) != value:
            raise InputError(f"{where}: rope_scaling.{name}={scaling[name]}: only {value} is known")
    return float(scaling["factor"])


@contextmanager
def fused_names(module: Any) -> Iterator[None]:
    """Within it, norm weights of a local-spec Megatron GPT carry Transformer Engine's fused names, which is what NeMo's
    mappings between Hugging Face and Megatron are written for. Nothing happens to a model that has those names."""
    moved = []
    for layer in module.decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            for name in list(norm._parameters):
                if norm._parameters[name] is not None:
                    linear.register_parameter(f"layer_norm_{name}", norm._parameters.pop(name))
                    moved.append((norm, name, linear))
    try:
        yield
    finally:
        for norm, name, linear in moved:
            norm.register_parameter(name, linear._parameters.pop(f"layer_norm_{name}"))


def _importer(source: "Source", dtype: str) -> Any:
    from nemo.collections.llm.gpt.model.llama import HFLlamaImporter

    from nemo_minitron.nemo import models

    models.quiet_nemo()

    class Importer(HFLlamaImporter):
        """NeMo's importer with a config that this host can run, and the names of its layer spec."""

        @property
        def config(self) -> Any:
            return models.to_config(source.architecture, seq_length=source.seq_length, precision=dtype)

        def convert_state(self, hf_model: Any, target: Any) -> Any:
            with fused_names(target.module):
                return super().convert_state(hf_model, target)

    return Importer(str(source.path))


def import_checkpoint(source: "Source", cache: Path) -> Path:
    """Convert a Hugging Face directory to a NeMo 2 directory once; a cached, single-process step.

    Raises:
        InputError: the weights do not fit the config.
    """
    key = hashlib.sha256(f"{_FORMAT}\n{source.sha256()}".encode()).hexdigest()[:24]
    final = cache / key
    if (final / "done").is_file():
        return final / "nemo"
    shutil.rmtree(final, ignore_errors=True)
    temporary = cache / f".{key}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    precision = "bf16" if _dtype(source.path) == "bfloat16" else "32"
    _importer(source, precision).apply(temporary / "nemo")
    (temporary / "done").touch()
    try:
        os.replace(temporary, final)
    except OSError:
        # Another process was faster; its copy is the same.
        shutil.rmtree(temporary, ignore_errors=True)
    return final / "nemo"


def _dtype(directory: Path) -> str:
    import json

    return str(json.loads((directory / "config.json").read_text()).get("torch_dtype", "float32"))


def export_checkpoint(source: "Source", output: Path) -> Path:
    """Write a NeMo 2 Llama checkpoint as a Hugging Face directory (safetensors, tokenizer); a single-process step.

    `head_dim` is always stated: after pruning it is not hidden_size / num_attention_heads.
    """
    from nemo.collections.llm.gpt.model.llama import HFLlamaExporter

    from nemo_minitron.config import TrainerConfig
    from nemo_minitron.nemo.session import Session, nemo_tokenizer

    assert source.kind == "nemo", source

    class Exporter(HFLlamaExporter):
        """NeMo's exporter, fed without running what the checkpoint's context names."""

        tokenizer = property(lambda self: nemo_tokenizer(source.tokenizer))
        config = property(lambda self: _huggingface_config(source, self.tokenizer))

        def is_llama4(self) -> bool:
            return False

        def nemo_load(self, path: Any, *args: Any, **kwargs: Any) -> Any:
            session = Session(source, TrainerConfig())
            return session.model, session.trainer

        def convert_state(self, model: Any, target: Any, source_config: Any = None) -> Any:
            with fused_names(model.module):
                return super().convert_state(model, target, source_config)

    return Path(Exporter(str(source.path)).apply(output))


def _huggingface_config(source: "Source", tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    a = source.architecture
    scaling = None
    if a.rope_scaling_factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": a.rope_scaling_factor,
            **LLAMA3_SCALING,
        }
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=a.num_layers,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_query_groups,
        head_dim=a.kv_channels,
        vocab_size=a.vocab_size,
        max_position_embeddings=source.seq_length,
        rms_norm_eps=a.layernorm_epsilon,
        rope_theta=a.rotary_base,
        rope_scaling=scaling,
        tie_word_embeddings=a.share_embeddings_and_output_weights,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
