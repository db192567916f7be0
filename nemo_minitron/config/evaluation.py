"""The schema of the group eval/."""

from dataclasses import dataclass, field
from typing import Annotated

from nemo_minitron.config.ranges import AboveZero, Choice, NamedCounts, Positive, Range


@dataclass
class JudgeConfig:
    """Who rates answers. `url`: of an OpenAI-compatible service, up to and with /v1; `model`: its name there;
    `key_variable`: the environment variable that has the service's key, if it wants one; `attempts` at each rating, of
    `timeout_s` seconds each; `parallel`: ratings at a time.
    """

    url: str | None = None
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    attempts: Annotated[int, Range(least=1, most=100)] = 3
    timeout_s: AboveZero = 60.0
    parallel: Annotated[int, Range(least=1, most=64)] = 4


@dataclass
class EvalConfig:
    """What is measured. `samples`: packed held-out sequences for the LM loss; null: one whole pass over the valid
    split. The rest is for `recipes/evaluate.py`.

    `lm`: whether held-out text is read at all. `tasks`: benchmarks, each `NAME` or `NAME@SHOTS` with the number of
    solved examples before each question: names of lm-evaluation-harness, whose data is on the hub; names of the data
    that `make eval-data` fetches; or a JSONL file of questions (`evaluation.multiple_choice.load_task`). `limit`: only
    the first items of each; null: all. `batch_size`: rows of a forward pass. `max_new_tokens`: of each written answer;
    null: the task's own. `limits`, `new_tokens`: the same two by the benchmark's name, for those that differ.
    `chat_template`: whether questions are put as messages; null: where the task is made for it. `allow_code`: whether
    benchmarks may run what the model wrote. `cache`: keep the answers, and take those that the same weights gave
    before. `judge`: for benchmarks that one rates. `backend`: what computes, "megatron" under any layout, or "hf",
    lm-evaluation-harness's own over transformers, in one process, which opens families that are not converted.
    """

    samples: Positive | None = 64
    lm: bool = True
    tasks: list[str] = field(default_factory=list)
    limit: Positive | None = None
    batch_size: Positive = 8
    max_new_tokens: Positive | None = None
    limits: NamedCounts | None = None
    new_tokens: NamedCounts | None = None
    chat_template: bool | None = None
    allow_code: bool = False
    backend: Annotated[str, Choice("megatron", "hf")] = "megatron"
    cache: bool = True
    judge: JudgeConfig = field(default_factory=JudgeConfig)
