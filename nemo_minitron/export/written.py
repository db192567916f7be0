"""What a written checkpoint computes, with one layer in memory: transformers' own forward pass, fed from the files
while it runs."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.gguf import weights
from nemo_minitron.checkpoints.gguf.config import config_json
from nemo_minitron.checkpoints.gguf.reader import read_header
from nemo_minitron.errors import FailedRun, InputError
from nemo_minitron.export.safetensors_writer import INDEX

# Real English text that every Python brings along (Python Software Foundation License).
_TEXT = ("exceptions", "with", "lambda", "assert")


def text() -> str:
    """Prose to compare logits over: chapters of Python's own reference manual."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in _TEXT)


def tokens_of(tokenizer: Any, sequences: int, length: int) -> Tensor:
    """The text's first tokens, int64 [sequences, length]."""
    ids = tokenizer.encode(text(), add_special_tokens=False)
    repeated = ids * -(-sequences * length // len(ids))
    return torch.tensor(repeated[: sequences * length]).view(sequences, length)


class Files:
    """Tensors of a directory's safetensors files by name, as the files themselves say what they hold."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.file_of: dict[str, Path] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self.file_of |= dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""
        from safetensors import safe_open

        with safe_open(self.file_of[name], "pt") as opened:
            return opened.get_tensor(name).float()


Read = Callable[[str], Tensor]


def directory_read(directory: Path, names: Collection[str]) -> tuple[Any, Read]:
    """The config of a Hugging Face directory, and what reads its tensors.

    Args:
        names: of the tensors that are to be in it, and no other.

    Raises:
        FailedRun: others are, or the index says something else than the files.
    """
    from transformers import AutoConfig

    files = Files(directory)
    if odd := sorted(set(names) ^ files.file_of.keys()):
        raise FailedRun(f"the files that were written and the model differ in the tensor {odd[0]}")
    found = {name: file.name for name, file in files.file_of.items()}
    index = directory / INDEX
    if index.exists() and json.loads(index.read_text(encoding="utf-8"))["weight_map"] != found:
        raise FailedRun(f"{INDEX} does not say where the tensors are")
    return AutoConfig.from_pretrained(str(directory), trust_remote_code=False), files.read


def gguf_read(
    path: Path, architecture_of: Callable[[Mapping[str, Any], str], Architecture]
) -> tuple[Any, Read]:
    """The same of a GGUF file, as `checkpoints.gguf` reads it.

    Args:
        architecture_of: `families.architecture_of`.

    Raises:
        FailedRun: it is not read as the file of such a model.
    """
    from transformers import AutoConfig

    where = path.name
    try:
        file = read_header(path, where)
        said = config_json(file, where)
        table = {w.name: w for w in weights.table(file, architecture_of(said, where), where)}
    except InputError as error:
        raise FailedRun(f"what was written cannot be read: {error}") from None
    return AutoConfig.for_model(**said), lambda name: torch.from_numpy(
        weights.values(file, table[name], where)
    )


def logits(
    config: Any, read: Read, tokens: Tensor, progress: Callable[[int], None] = lambda _: None
) -> Tensor:
    """transformers' logits, computed in float32.

    Args:
        config: transformers', of one of the six families.
        read: gives a weight in float32 by its name.
        tokens: int64 [b, s].
        progress: told how many layers are done.

    Returns:
        float32 [b, s, vocab].
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).eval()
    # Its frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, module in _units(model):
        _feed(module, f"{name}.", read)
    tied = config.tie_word_embeddings
    _feed(model.lm_head, "model.embed_tokens." if tied else "lm_head.", read)
    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_hook(lambda *_, done=number: progress(done))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def _units(model: Any) -> list[tuple[str, nn.Module]]:
    layers = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]
    return [("model.embed_tokens", model.model.embed_tokens), *layers, ("model.norm", model.model.norm)]


def _feed(module: nn.Module, prefix: str, read: Read) -> None:
    """Let a module have its weights only while it runs."""
    names = [name for name, _ in module.named_parameters()]

    def load(*_: Any) -> None:
        module.load_state_dict({name: read(prefix + name) for name in names}, strict=True, assign=True)

    def drop(*_: Any) -> None:
        module.to("meta")

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)
