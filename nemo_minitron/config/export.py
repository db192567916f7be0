"""The schema of `recipes/export.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.ranges import Choice, PathName, Range
from nemo_minitron.config.recipes import CommonConfig

# What gguf's Python packs, and what llama.cpp's own quantiser does.
GGUF_PLAIN = ("F32", "F16", "BF16", "Q8_0")
GGUF_QUANTISED = ("Q4_0", "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")


@dataclass
class ExportConfig:
    """How a checkpoint is written.

    `dtype`: of Hugging Face weights, "source", "float32", "bfloat16", "float16", or "fp8", which ModelOpt makes where
    there is CUDA. `shard_size`: of a file of them at
    most, in bytes or as "5GB". `quantization`: of a GGUF file's matrices, by llama.cpp's name; all but F32, F16, BF16
    and Q8_0 are made by llama.cpp itself and need the package llama-cpp-python. `verify_tokens`: of real text, over
    which what was written must give the Megatron model's logits. `perplexity_tokens`: of the same text, over which
    llama.cpp runs a quantised file and an F16 one beside it; 0: it does not.
    """

    dtype: Annotated[str, Choice("source", "float32", "bfloat16", "float16", "fp8")] = "source"
    shard_size: str = "5GB"
    quantization: Annotated[str, Choice(*GGUF_PLAIN, *GGUF_QUANTISED)] = "F16"
    verify_tokens: Annotated[int, Range(least=2)] = 256
    perplexity_tokens: Annotated[int, Range(least=0, most=100_000)] = 256


@dataclass
class ExportRecipe(CommonConfig):
    """`recipes/export.py`. `source`: a Hugging Face, NeMo 2 or run directory, or a GGUF file. `format`: "hf", a
    directory for transformers, or "gguf", a file for llama.cpp. `to`: the directory that is written; null: in the run
    directory. `license`: of the base model, by the hub's name; null: as its files say; "none": of one's own. `publish`:
    ORG/NAME on the hub: what would be sent is listed; `push`: and sent.
    """

    source: PathName = MISSING
    format: Annotated[str, Choice("hf", "gguf")] = "hf"
    to: PathName | None = None
    license: str | None = None
    publish: str | None = None
    push: bool = False
    export: ExportConfig = field(default_factory=ExportConfig)
