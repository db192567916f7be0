"""What `recipes/synthesize.py` is told, and what of it can be refused at once."""

import importlib.util
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from nemo_minitron.config.ranges import Choice, Count, PathName, Positive, Range
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.errors import InputError

MEGATRON = "megatron"
Share = Annotated[float, Range(above=0, most=1)]
# Changing one of these leaves the text as it is: only what is kept of it changes.
_KEEPING = (
    "include_prompt",
    "min_new_tokens",
    "repetition_ngram",
    "max_repetition",
    "near_duplicate_jaccard",
    "excerpts",
)


@dataclass
class SynthesizeConfig:
    """What the teacher writes, with what, and what of it is kept.

    `backend`: "megatron" (Megatron-core's own text generation, sharded as `trainer` says), "huggingface" or "vllm"
    (one process each). `prompts`: a file, one prompt a line, or .jsonl with `prompt_key`; null: the corpus's own
    `openings`, the first `opening_tokens` of train "documents" or of its packed "sequences". `samples` in all, prompts
    in turn, `batch_size` at once, each up to `max_new_tokens` or the end-of-document token, at `temperature`, from the
    `top_k` tokens or those that hold `top_p` of the probability; null and 1.0: all.

    Kept is what has at least `min_new_tokens`, at most `max_repetition` of `repetition_ngram`-grams that were there
    before, is no copy of an earlier text, nor shares `near_duplicate_jaccard` of its 5-grams with one (null: not
    asked). `include_prompt`: whether the prompt is part of the text. `excerpts` in the report.
    """

    backend: Annotated[str, Choice(MEGATRON, "huggingface", "vllm")] = MEGATRON
    prompts: PathName | None = None
    prompt_key: str = "prompt"
    openings: Annotated[str, Choice("documents", "sequences")] = "documents"
    opening_tokens: Count = 32
    samples: Positive = 512
    batch_size: Positive = 64
    max_new_tokens: Positive = 480
    temperature: Annotated[float, Range(above=0, most=1000)] = 1.0
    top_p: Share = 1.0
    top_k: Positive | None = None
    include_prompt: bool = True
    min_new_tokens: Positive = 32
    repetition_ngram: Positive = 8
    max_repetition: Annotated[float, Range(least=0, most=1)] = 0.5
    near_duplicate_jaccard: Share | None = 0.7
    excerpts: Count = 5


def sampling(s: SynthesizeConfig) -> dict[str, Any]:
    """The settings that decide the text, and not only what is kept of it."""
    return {key: value for key, value in asdict(s).items() if key not in _KEEPING}


def check_settings(s: SynthesizeConfig, t: TrainerConfig) -> None:
    """Refuse what no backend can do, and a backend that is not here.

    Raises:
        InputError: names the setting, its value and what would be legal.
    """
    if s.openings == "sequences" and s.opening_tokens < 1:
        raise InputError(
            f"synthesize.opening_tokens={s.opening_tokens}: must be at least 1 with synthesize.openings=sequences"
        )
    if s.min_new_tokens > s.max_new_tokens:
        raise InputError(
            f"synthesize.min_new_tokens={s.min_new_tokens}: must be at most synthesize.max_new_tokens="
            f"{s.max_new_tokens}, or nothing would be kept"
        )
    if s.top_k is not None and s.top_p < 1:
        raise InputError(
            f"synthesize.top_k={s.top_k}, synthesize.top_p={s.top_p}: Megatron-core takes one of both; leave "
            "synthesize.top_k at null or synthesize.top_p at 1.0"
        )
    _check_backend(s.backend, t)


def _check_backend(backend: str, t: TrainerConfig) -> None:
    if backend == MEGATRON:
        return
    if t.ranks > 1:
        raise InputError(
            f"synthesize.backend={backend}: runs in one process, but the layout has {t.ranks} (trainer.*_parallel_size)"
            f"; {MEGATRON} writes sharded"
        )
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"synthesize.backend=vllm: vllm is not installed here (pip install vllm, with a GPU); {MEGATRON} and "
            "huggingface are"
        )
