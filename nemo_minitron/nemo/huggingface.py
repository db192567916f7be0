"""Hugging Face checkpoints in, on NeMo's own importers (nemo_toolkit 2.4.1), and out, by `nemo_minitron.export`.

What is NeMo's: the mapping between both sides' weights, the model, the saving. What is done here, for all families
alike: the configs (NeMo's importers fix sizes, leave out head_dim and untie embeddings), loading without code from the
checkpoint (NeMo's pass trust_remote_code=True), and the names of the layer spec that runs on this host.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.export import generation
from nemo_minitron.export.distributed_reader import DistributedReader
from nemo_minitron.export.huggingface import SHARD_BYTES, SOURCE_DTYPE, Model, dtype_of, write
from nemo_minitron.export.tensors import Weights
from nemo_minitron.nemo.families import FAMILIES, config_of

if TYPE_CHECKING:
    from nemo_minitron.nemo.checkpoints import Source

# How a converted checkpoint is laid out; part of the cache's key.
_FORMAT = 3


def check_shapes(arch: Architecture, shapes: dict[str, Any], where: str) -> None:
    """Whether the weights are those that the config states: transformers would draw what is missing at random.

    Args:
        shapes: by name, of all weight files.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    for name, shape in _shapes(arch):
        if name not in shapes:
            raise InputError(f"{where}: the weight files lack {name}, which config.json asks for")
        if shapes[name] != shape:
            raise InputError(f"{where}: {name} has shape {shapes[name]}, by config.json it has {shape}")


def _shapes(a: Architecture) -> Iterator[tuple[str, list[int]]]:
    h, queries, keys = (
        a.hidden_size,
        a.num_attention_heads * a.kv_channels,
        a.num_query_groups * a.kv_channels,
    )
    yield "model.embed_tokens.weight", [a.vocab_size, h]
    if not a.share_embeddings_and_output_weights:
        yield "lm_head.weight", [a.vocab_size, h]
    yield "model.norm.weight", [h]
    layer = {
        "input_layernorm": [h],
        "self_attn.q_proj": [queries, h],
        "self_attn.k_proj": [keys, h],
        "self_attn.v_proj": [keys, h],
        "self_attn.o_proj": [h, queries],
        "post_attention_layernorm": [h],
        **({"mlp.gate_proj": [a.ffn_hidden_size, h]} if a.gated_linear_unit else {}),
        "mlp.up_proj": [a.ffn_hidden_size, h],
        "mlp.down_proj": [h, a.ffn_hidden_size],
    }
    for number in range(a.num_layers):
        for name, shape in layer.items():
            yield f"model.layers.{number}.{name}.weight", shape


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


@contextmanager
def untied(module: Any) -> Iterator[None]:
    """Within it, a Megatron GPT with tied embeddings has an output weight of its own, with the embedding's values: some
    of NeMo's mappings (Qwen2, Mistral, Nemotron) name it for every model."""
    import torch

    if not module.share_embeddings_and_output_weights:
        yield
        return
    head, table = module.output_layer, module.embedding.word_embeddings.weight
    before = vars(head).pop("weight", None)
    slot = head._parameters.pop("weight", None)
    head.register_parameter("weight", torch.nn.Parameter(table.detach().clone()))
    try:
        yield
    finally:
        del head._parameters["weight"]
        if slot is not None:
            head._parameters["weight"] = slot
        else:
            head.weight = before


def import_checkpoint(source: "Source", cache: Path) -> Path:
    """Convert a Hugging Face directory to a NeMo 2 directory once; a cached, single-process step."""
    carried = json.dumps(generation.gathered(source.path), sort_keys=True)
    key = hashlib.sha256(f"{_FORMAT}\n{source.sha256()}\n{carried}".encode()).hexdigest()[:24]
    final = cache / key
    if (final / "done").is_file():
        return final / "nemo"
    shutil.rmtree(final, ignore_errors=True)
    temporary = cache / f".{key}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    precision = "bf16" if _dtype(source.path) == "bfloat16" else "32"
    try:
        _importer(source, precision, temporary / "tokenizer").apply(temporary / "nemo")
        shutil.rmtree(temporary / "tokenizer")
        (temporary / "done").touch()
        os.replace(temporary, final)
    except OSError:
        # Another process was faster; its copy is the same.
        if not (final / "done").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final / "nemo"


def _importer(source: "Source", precision: str, assets: Path) -> Any:
    """NeMo's importer for the source's family; `assets`: where the tokenizer's files are gathered."""
    from nemo_minitron.nemo import models
    from nemo_minitron.nemo.session import nemo_tokenizer

    models.quiet_nemo()
    base = _connector(source, "Importer")

    class Importer(base):  # type: ignore[valid-type, misc]
        """With a config that this host can run and that keeps every size, and the names of its layer spec."""

        config = property(
            lambda self: models.to_config(
                source.architecture, seq_length=source.seq_length, precision=precision
            )
        )
        tokenizer = property(lambda self: nemo_tokenizer(_tokenizer_files(source.path, assets)))

        def init(self) -> Any:
            return models.to_model(self.config, self.tokenizer)

        def apply(self, output: Path) -> Path:
            from nemo.lightning import teardown

            theirs, model = load_huggingface(source.path), self.init()
            trainer = self.nemo_setup(model)
            with fused_names(model.module), untied(model.module):
                self.convert_state(theirs, model)
            self.nemo_save(output, trainer)
            teardown(trainer, model)
            return output

    return Importer(str(source.path))


def _connector(source: "Source", kind: str) -> Any:
    from nemo_minitron.nemo import models

    model_type = source.architecture.model_type
    if model_type is None:
        raise InputError(
            f"{source.path}: NeMo has no Hugging Face {kind.lower()} for a plain GPTModel; it has one for "
            f"{', '.join(FAMILIES)}"
        )
    if model_type == "gemma" and not source.architecture.share_embeddings_and_output_weights:
        raise InputError(f"{source.path}: NeMo's Gemma {kind.lower()} knows tied embeddings only")
    return models.nemo_class(model_type, f"HF{FAMILIES[model_type].connector}{kind}")


def load_huggingface(directory: Path) -> Any:
    """transformers' model of a Hugging Face directory, with all of its weights and nothing but them.

    Raises:
        InputError: the weights do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory), torch_dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{directory}: the weights do not fit config.json ({reason})") from None
    # Rotary frequencies were once saved, and are computed now.
    unknown = [name for name in found["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    for names, what in (
        (found["missing_keys"], "lack"),
        (unknown, "hold a tensor that config.json does not:"),
    ):
        if names:
            raise InputError(f"{directory}: the weights {what} {sorted(names)[0]}")
    return model


def _tokenizer_files(directory: Path, to: Path) -> Path:
    from transformers import AutoTokenizer

    if not to.is_dir():
        AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False).save_pretrained(str(to))
        # NeMo copies the tokenizer's directory into the context of each checkpoint that comes of this one.
        generation.write(generation.gathered(directory), to)
    return to


def _dtype(directory: Path) -> str:
    return str(json.loads((directory / "config.json").read_text()).get("torch_dtype", "float32"))


def export_model(source: "Source", dtype: str = SOURCE_DTYPE) -> Model:
    """What `export.huggingface` writes of a checkpoint.

    Args:
        source: of kind "nemo".
        dtype: as `export.huggingface.dtype_of`.

    Raises:
        InputError: a model that Hugging Face has no family for, a dtype that is none, weights that do not fit the
            configuration.
    """
    from nemo_minitron.nemo.checkpoints import contents

    assert source.kind == "nemo", source
    if source.architecture.model_type is None:
        raise InputError(
            f"{source.path}: a plain GPTModel has no Hugging Face form; those that have are {', '.join(FAMILIES)}"
        )
    weights = Weights(source.architecture, DistributedReader(source.path / "weights", contents(source)))
    weights.check()
    config = config_of(source.architecture, source.seq_length)
    return Model(weights, config, source.tokenizer, dtype_of(dtype, weights))


def export_checkpoint(source: "Source", output: Path) -> Path:
    """Write a NeMo 2 checkpoint as a Hugging Face directory (safetensors, tokenizer); a single-process step.

    Raises:
        InputError: as `export_model`.
    """
    model = export_model(source)
    output.mkdir(parents=True, exist_ok=True)
    write(model, output, SHARD_BYTES)
    return output
