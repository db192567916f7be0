"""Random students with a trained tokenizer, as recipes/export.py writes them: for transformers and for llama.cpp."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from nemo_minitron.export import generation, gguf_model, huggingface
from nemo_minitron.export.gguf_tokenizer import vocabulary_of
from nemo_minitron.export.tensors import Weights
from tests.support import gguf_files
from tests.support.stacked_weights import of_family, saved, stacked

TEXT = [
    "The quick brown fox jumps over the lazy dog 12345 times.",
    "don't stop; we'LL go  on\n\n to x_y = 1",
] * 3
ROWS = 340
# llama.cpp's loaders of these have queries as wide as the residual stream.
SQUARE = {"qwen2": {"kv_channels": 6}, "nemotron": {"kv_channels": 6, "rotary_percent": 2 / 3}}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Student:
    """A random model with a trained tokenizer, and where it lies as a Hugging Face directory."""

    model: huggingface.Model
    tokenizer: Any
    settings: dict[str, Any]
    directory: Path

    @property
    def vocabulary(self) -> Any:
        rows = self.model.weights.architecture.vocab_size
        return vocabulary_of(self.tokenizer, self.settings, rows, "student")

    def written(self, file: Path, kind: str) -> gguf_model.Report:
        return gguf_model.write(self.model, self.vocabulary, file, kind)

    def transformers(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.directory).eval()


def byte_level(directory: Path) -> Any:
    """A byte-level BPE with turn marks; two rows of the embeddings have no token."""
    from transformers import PreTrainedTokenizerFast

    bpe = gguf_files.byte_level(TEXT, ROWS - 2, PRE_TOKENIZERS[2].rules())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def made(
    place: Path,
    arch: Architecture,
    tensors: dict[str, torch.Tensor] | None = None,
    generation_settings: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard: int = 10**9,
) -> Student:
    (place / "tokenizer").mkdir(parents=True)
    byte_level(place / "tokenizer")
    generation.write(generation_settings or {}, place / "tokenizer")
    weights = Weights(arch, saved(place / "weights", tensors or stacked(arch)))
    model = huggingface.Model(weights, config_of(arch, 128), place / "tokenizer", dtype)
    (place / "hf").mkdir()
    huggingface.write(model, place / "hf", max_shard)
    settings = huggingface.generation_settings(place / "tokenizer", arch.vocab_size)
    tokenizer = huggingface.load_tokenizer(place / "tokenizer", arch.vocab_size)
    return Student(model, tokenizer, settings, place / "hf")


def arch_of(name: str) -> Architecture:
    arch = of_family(name, vocab_size=ROWS, **SQUARE.get(name, {}))
    if name == "llama":
        return arch.replace(rope_scaling_factor=32.0, rope_original_context=16, rotary_base=5e5)
    return arch
