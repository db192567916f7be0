"""llama.cpp in this process, by xllamacpp's wheel: what a GGUF file says next, and how probable a text is to it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Far above what any logit reaches: the token is certain to come.
_CERTAIN = 1000.0
_QUIET = -1
# Its wording where no complete character came, or a token that it does not name.
_NOTHING: dict[str, Any] = {}


@contextmanager
def opened(file: Path, context: int, threads: int = 1, *, exact: bool = False) -> Iterator[Any]:
    """A server of a file, without a port, for one conversation at a time.

    Args:
        context: in tokens.
        threads: more than the machine has free are slower than one, since they wait by spinning.
        exact: keep keys and values in float32; otherwise, as llama.cpp does unless told, in float16.

    Raises:
        RuntimeError: llama.cpp does not open the file.
    """
    import xllamacpp  # type: ignore

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
    params.warmup, params.verbosity = False, _QUIET
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    try:
        yield server
    finally:
        del server


def perplexity(
    server: Any, ids: Sequence[int], progress: Callable[[int], None] = lambda _: None
) -> tuple[float, int]:
    """exp of the mean negative log-probability of each token but the first, and of how many that is.

    The server tells the probability of the token that it takes, and takes the one that it is made to.

    Args:
        ids: fewer than the server's context.
        progress: told how many tokens are done.

    Raises:
        RuntimeError: it tells of no token.
    """
    total, count = 0.0, 0
    for end in range(1, len(ids)):
        asked = {
            "prompt": list(ids[:end]),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "cache_prompt": True,
        }
        answer = server.handle_completions({**asked, "logit_bias": [[ids[end], _CERTAIN]]})
        said = _first(answer)
        # Of a token that is half a character the server tells nothing; it is left out under every quantisation.
        if said.get("id") == ids[end]:
            total, count = total - said["logprob"], count + 1
        progress(end)
    if not count:
        raise RuntimeError("llama.cpp told of none of the text's tokens")
    return math.exp(total / count), count


def continuation(server: Any, ids: Sequence[int], most: int) -> str:
    """What it writes after a text, greedily, until a stop token of the file or `most` tokens.

    Raises:
        RuntimeError: it does not answer.
    """
    asked = {"prompt": list(ids), "max_tokens": most, "temperature": 0, "cache_prompt": False}
    answer = server.handle_completions(asked)
    if "error" in answer:
        raise RuntimeError(f"llama.cpp: {answer['error'].get('message')}")
    return str(answer["choices"][0]["text"])


def _first(answer: Any) -> dict[str, Any]:
    if "error" in answer:
        raise RuntimeError(f"llama.cpp: {answer['error'].get('message')}")
    content = (answer["choices"][0].get("logprobs") or _NOTHING).get("content")
    return content[0] if content else _NOTHING
