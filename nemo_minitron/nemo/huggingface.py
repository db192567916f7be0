"""Hugging Face checkpoints in, on NeMo's own importers (nemo_toolkit 2.4.1), and out, by `nemo_minitron.export`.

What is NeMo's: the mapping between both sides' weights, the model, the saving. What is done here, for all families
alike: the configs (NeMo's importers fix sizes, leave out head_dim and untie embeddings), loading without code from the
checkpoint (NeMo's pass trust_remote_code=True), and the names of the layer spec that runs on this host.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.families import FAMILIES, config_of
from nemo_minitron.checkpoints.saved_dtype import saving_in
from nemo_minitron.checkpoints.source import contents
from nemo_minitron.checkpoints.tensor_files import check_tied
from nemo_minitron.checkpoints.untrusted import read_json
from nemo_minitron.checkpoints.weight_files import read_headers
from nemo_minitron.errors import InputError
from nemo_minitron.export.distributed_reader import DistributedReader
from nemo_minitron.export.huggingface import SHARD_BYTES, SOURCE_DTYPE, Model, dtype_of, write
from nemo_minitron.export.tensors import Weights
from nemo_minitron.files import file_sha256, making_once
from nemo_minitron.nemo import models
from nemo_minitron.nemo.session import nemo_tokenizer

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.source import Source

# How a converted checkpoint is laid out; part of the cache's key.
_FORMAT = 4


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
    key = hashlib.sha256(f"{_FORMAT}\n{source.sha256()}\n{_beside(source)}".encode()).hexdigest()[:24]
    final = cache / key
    if (final / "done").is_file():
        return final / "nemo"
    shutil.rmtree(final, ignore_errors=True)
    with making_once(final) as temporary:
        temporary.mkdir()
        _importer(source, _import_dtype(source)).apply(temporary / "nemo")
        (temporary / "done").touch()
    return final / "nemo"


def _beside(source: "Source") -> str:
    """Identity of what a conversion takes over beside the weights: tokenizer, chat templates, generation settings."""
    total = hashlib.sha256()
    for file in sorted(source.path.rglob("*")):
        kept = file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and file.is_file()
        if kept and file.parent.name in (source.path.name, "additional_chat_templates"):
            total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def _importer(source: "Source", dtype: str) -> Any:
    """NeMo's importer for the source's family.

    Args:
        source: of kind "huggingface".
        dtype: of the converted weights, "float32" or "bfloat16".
    """
    models.quiet_nemo()
    base = _connector(source, "Importer")

    class Importer(base):  # type: ignore[valid-type, misc]
        """With a config that this host can run and that keeps every size, and the names of its layer spec."""

        config = property(
            lambda self: models.to_config(
                source.architecture,
                seq_length=source.seq_length,
                precision="bf16" if dtype == "bfloat16" else "32",
            )
        )
        tokenizer = property(lambda self: nemo_tokenizer(source.path))

        def init(self) -> Any:
            return models.to_model(self.config, self.tokenizer)

        def apply(self, output: Path) -> Path:
            from nemo.lightning import teardown

            theirs, model = load_huggingface(source, dtype), self.init()
            trainer = self.nemo_setup(model)
            with fused_names(model.module), untied(model.module):
                self.convert_state(theirs, model)
            # float16 is converted and computed in float32, which holds it exactly, and need not lie so on the disk.
            with saving_in(trainer, model, source.dtype, lossless=True):
                self.nemo_save(output, trainer)
            teardown(trainer, model)
            return output

    return Importer(str(source.path))


def _connector(source: "Source", kind: str) -> Any:
    model_type = source.architecture.model_type
    if model_type is None:
        raise InputError(
            f"{source.path}: NeMo has no Hugging Face {kind.lower()} for a plain GPTModel; it has one for "
            f"{', '.join(FAMILIES)}"
        )
    if model_type == "gemma" and not source.architecture.share_embeddings_and_output_weights:
        raise InputError(f"{source.path}: NeMo's Gemma {kind.lower()} knows tied embeddings only")
    return models.nemo_class(model_type, f"HF{FAMILIES[model_type].connector}{kind}")


def load_huggingface(source: "Source", dtype: str | None = None) -> Any:
    """transformers' model of a Hugging Face directory, with all of its weights and nothing but them.

    The model is built from what this project read in config.json, not by transformers' own reading of it: 4.51.3 takes
    no rotary base from the form that transformers 5 writes.

    Args:
        source: of kind "huggingface".
        dtype: of the parameters, in torch's word; None: that of most of the weights on disk.

    Raises:
        InputError: two weights that are to be one differ, or generation_config.json is invalid.
    """
    import torch

    assert source.kind == "huggingface", source
    model = _empty(_model_config(source), getattr(torch, dtype or source.dtype))
    model.tie_weights()
    _fill(model.state_dict(), source)
    if (file := source.path / "generation_config.json").is_file():
        model.generation_config = _generation_config(file, f"source={source.path}")
    return model.eval()


def _empty(config: Any, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, torch_dtype=dtype)


def _fill(weights: dict[str, Any], source: "Source") -> None:
    """Copy the files' tensors into `weights`, one at a time, each cast to the parameter's dtype."""
    import torch
    from safetensors import safe_open

    where = f"source={source.path}"
    tensors = read_headers(source.path, where)
    if source.architecture.share_embeddings_and_output_weights:
        check_tied(tensors, where)
    for file in source.files:
        names = [name for name, tensor in tensors.items() if tensor.file == file]
        with torch.no_grad(), safe_open(file, framework="pt") as opened:
            for name in names:
                if not name.endswith("rotary_emb.inv_freq"):
                    weights[name].copy_(opened.get_tensor(name))


def _model_config(source: "Source") -> Any:
    """transformers' config of a Hugging Face directory, from its architecture and its ids for generation."""
    from transformers import AutoConfig

    said = read_json(source.path / "config.json", f"source={source.path}")
    ids = {key: said.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    arch = source.architecture
    return AutoConfig.for_model(arch.model_type, **ids, **config_of(arch, source.seq_length))


def _generation_config(file: Path, where: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(read_json(file, where))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: {file.name} is not valid ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _import_dtype(source: "Source") -> str:
    """What loses nothing: float32 but for weights that are bfloat16 altogether."""
    dtypes = {tensor.dtype for tensor in read_headers(source.path, f"source={source.path}").values()}
    return "bfloat16" if dtypes == {"BF16"} else "float32"


def export_model(source: "Source", dtype: str = SOURCE_DTYPE) -> Model:
    """What `export.huggingface` writes of a checkpoint.

    Args:
        source: of kind "nemo".
        dtype: as `export.huggingface.dtype_of`.

    Raises:
        InputError: a model that Hugging Face has no family for, an invalid dtype, weights that do not fit the
            configuration.
    """
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


def exported_once(source: "Source", cache: Path) -> Path:
    """The Hugging Face form of a checkpoint: NeMo 2 directories are exported once, into the cache.

    Raises:
        InputError: as `export_model`.
    """
    if source.kind == "huggingface":
        return source.path
    tokenizer = "".join(file_sha256(file) for file in sorted(source.tokenizer.iterdir()) if file.is_file())
    final = cache / hashlib.sha256(f"{source.sha256()}{tokenizer}".encode()).hexdigest()[:24]
    if not final.is_dir():
        with making_once(final) as temporary:
            export_checkpoint(source, temporary)
    return final
