"""llama.cpp in this process (xllamacpp's wheel), as the reference for GGUF files: what it makes of a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(file: Path, context: int = 128) -> Iterator[Any]:
    """A server of the file on one thread; the test is skipped where there is no wheel."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    try:
        yield server
    finally:
        del server


def next_token(server: Any, prompt: str | list[int], ascii_token: int, count: int = 5) -> dict[int, float]:
    """Log-probabilities of the most probable next tokens, by id.

    Args:
        ascii_token: the token that is made to come: the server tells nothing of one that is half a character. The
            probabilities are those before that.
    """
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": count,
            "logit_bias": [[ascii_token, 1000.0]],
            "cache_prompt": False,
        }
    )
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def greedy(server: Any, prompt: str | list[int], count: int) -> list[int]:
    """The ids of the next `count` tokens."""
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1, "cache_prompt": False}
    )
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


def text(server: Any, prompt: str | list[int], count: int) -> str:
    """What it writes, greedily, in at most `count` tokens; it does not stop before."""
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    )
    return str(answer["choices"][0]["text"])
