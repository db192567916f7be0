"""What `recipes/synthesize.py` is told, and what of it can be refused at once."""

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.layout import TrainerConfig, check_least

MEGATRON = "megatron"
BACKENDS = (MEGATRON, "huggingface", "vllm")
OPENINGS = ("documents", "sequences")
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

    backend: str = MEGATRON
    prompts: str | None = None
    prompt_key: str = "prompt"
    openings: str = "documents"
    opening_tokens: int = 32
    samples: int = 512
    batch_size: int = 64
    max_new_tokens: int = 480
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    include_prompt: bool = True
    min_new_tokens: int = 32
    repetition_ngram: int = 8
    max_repetition: float = 0.5
    near_duplicate_jaccard: float | None = 0.7
    excerpts: int = 5


def sampling(s: SynthesizeConfig) -> dict[str, Any]:
    """The settings that decide the text, and not only what is kept of it."""
    return {key: value for key, value in asdict(s).items() if key not in _KEEPING}


def check_settings(s: SynthesizeConfig, t: TrainerConfig) -> None:
    """Refuse what no backend can do, and a backend that is not here.

    Raises:
        InputError: names the setting, its value and what would be legal.
    """
    if s.backend not in BACKENDS:
        raise InputError(f"synthesize.backend={s.backend}: must be one of {', '.join(BACKENDS)}")
    if s.openings not in OPENINGS:
        raise InputError(f"synthesize.openings={s.openings}: must be one of {', '.join(OPENINGS)}")
    least = {"samples": 1, "batch_size": 1, "max_new_tokens": 1, "min_new_tokens": 1, "repetition_ngram": 1}
    for key, value in {**least, "opening_tokens": int(s.openings == "sequences"), "excerpts": 0}.items():
        check_least(f"synthesize.{key}", getattr(s, key), value)
    _check_shares(s)
    if s.temperature <= 0:
        raise InputError(
            f"synthesize.temperature={s.temperature}: must be above 0; synthesize.top_k=1 is greedy"
        )
    if s.top_k is not None:
        check_least("synthesize.top_k", s.top_k, 1)
        if s.top_p < 1:
            raise InputError(
                f"synthesize.top_k={s.top_k}, synthesize.top_p={s.top_p}: Megatron-core takes one of both; leave "
                "synthesize.top_k at null or synthesize.top_p at 1.0"
            )
    _check_backend(s.backend, t)


def _check_shares(s: SynthesizeConfig) -> None:
    for key in ("top_p", "max_repetition", "near_duplicate_jaccard"):
        value = getattr(s, key)
        if value is not None and not (0 < value <= 1 or (key == "max_repetition" and value == 0)):
            raise InputError(f"synthesize.{key}={value}: must be above 0 and at most 1")


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
