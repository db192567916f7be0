"""A Hugging Face directory of any family that transformers has a class for: to be measured, never to be pruned.

Nothing of it is run: no remote code, safetensors only; the sizes are those of transformers' model without weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.config_values import short
from nemo_minitron.checkpoints.families import FAMILIES
from nemo_minitron.checkpoints.source import weights_sha256
from nemo_minitron.checkpoints.untrusted import check_regular, read_json
from nemo_minitron.checkpoints.weight_files import Tensor, read_headers
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.files import user_path

_CONTEXT = 2048  # where a config names none, as lm-evaluation-harness takes it
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class AnyModel:
    """A directory as found on disk. `seq_length`: of its context, in tokens; `files`: of its weights."""

    path: Path
    model_type: str
    vocab_size: int
    seq_length: int
    parameters: int
    non_embedding_parameters: int
    files: tuple[Path, ...]

    @property
    def tokenizer(self) -> Path:
        """A directory."""
        return self.path

    def sha256(self) -> str:
        """Identity of the weights and the configuration."""
        return weights_sha256([self.path / "config.json", *self.files])


def is_of_another_family(directory: Path) -> bool:
    """Whether a directory's config.json names a family that is not converted."""
    file = directory / "config.json"
    if not file.is_file():
        return False
    name = read_json(file, str(directory)).get("model_type")
    return isinstance(name, str) and name not in FAMILIES


def find_any(path: str | Path, key: str = "source") -> AnyModel:
    """Recognise a directory and check that it is whole.

    Raises:
        InputError: no Hugging Face directory, a family that transformers has no class for, quantised weights, a weight
            that is missing or has another shape.
    """
    directory, where = user_path(path), f"{key}={path}"
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{where}: the hf backend opens Hugging Face directories (config.json, *.safetensors)"
        )
    check_regular(directory, where)
    said = read_json(directory / "config.json", where)
    _check_family(said, where)
    tensors = read_headers(directory, where)
    if not (directory / "tokenizer_config.json").is_file():
        raise InputError(f"{where}: no tokenizer (tokenizer_config.json)")
    if (layers := max([v for k in _LAYERS if type(v := said.get(k)) is int], default=0)) > len(tensors):
        raise InputError(
            f"{where}: config.json asks for {layers} layers, the files have {len(tensors)} tensors"
        )
    config, model = _without_weights(directory, where)
    _check_weights(model, tensors, where)
    embedding = {id(p) for part in _embeddings(model) for p in part.parameters()}
    parameters = list(model.parameters())  # tied ones once
    context = getattr(config, "max_position_embeddings", None)
    return AnyModel(
        path=directory,
        model_type=said["model_type"],
        vocab_size=model.get_input_embeddings().weight.shape[0],
        seq_length=context if type(context) is int and context > 0 else _CONTEXT,
        parameters=sum(p.numel() for p in parameters),
        non_embedding_parameters=sum(p.numel() for p in parameters if id(p) not in embedding),
        files=tuple(sorted({tensor.file for tensor in tensors.values()})),
    )


def load_directory(directory: Path, dtype: str) -> Any:
    """transformers' model of a directory with its weights; nothing of the directory is run.

    Args:
        dtype: of the parameters, in torch's word, or "auto": as on the disk.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    # torch's fused attention knows no soft capping (Gemma 2), and transformers 4.51.3 passes over it there.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        torch_dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation="eager" if capped else None,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    ).eval()


def _check_family(said: dict[str, Any], where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = said.get("model_type")
    if not isinstance(name, str) or name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{where}: model_type {short(name)}: transformers has no language model of it without remote code"
        )
    if "quantization_config" in said:
        raise InputError(f"{where}: config.json: quantization_config: quantised weights are not read")


def _without_weights(directory: Path, where: str) -> tuple[Any, Any]:
    """The directory's config and its model on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
    except Exception as error:  # whatever a class of transformers makes of values that nobody checked
        raise InputError(
            f"{where}: transformers does not take its config.json ({first_line(error)})"
        ) from None
    return config, model


def _check_weights(model: Any, tensors: dict[str, Tensor], where: str) -> None:
    """transformers would draw at random what is missing."""
    prefix = f"{model.base_model_prefix}."
    found = {name: tensor.shape for name, tensor in tensors.items()}
    found |= {f"{prefix}{name}": tensor.shape for name, tensor in tensors.items()}
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    for name, parameter in model.state_dict().items():
        if name not in found and name not in tied:
            raise InputError(f"{where}: the weight files lack {name}, which config.json asks for")
        if name in found and found[name] != list(parameter.shape):
            raise InputError(
                f"{where}: {name} has shape {found[name]}, by config.json it has {list(parameter.shape)}"
            )


def _embeddings(model: Any) -> list[Any]:
    """Tables of tokens and positions, and the output layer."""
    import torch

    output = model.get_output_embeddings()
    tables = [part for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    return tables if output is None else [*tables, output]
