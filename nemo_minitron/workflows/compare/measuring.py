"""A process that loads one model, lets it write, and says how fast: JSON on stdin, the figures as the last line of
stdout. It imports neither NeMo nor Megatron: a Hugging Face directory is transformers' affair, a GGUF file llama.cpp's.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.any_family import load_directory
from nemo_minitron.environment import rss_gib
from nemo_minitron.export import llama_cpp

_WARM_UP = 4  # tokens


def main() -> None:
    """Read, measure, print."""
    asked = json.load(sys.stdin)
    measure = _llama_cpp if asked["engine"] == "llama.cpp" else _transformers
    print(json.dumps(measure(Path(asked["path"]), asked["prompt"], asked["new_tokens"], asked["threads"])))


def figures(begin: float, times: list[float], tokens: int, memory_gib: float, device: str) -> dict[str, Any]:
    """Of one answer.

    Args:
        begin: when it was asked for, in seconds of a clock.
        times: when tokens came; the first and the last count.
        tokens: how many there were.
    """
    return {
        "first_s": times[0] - begin,
        "tokens_per_s": (tokens - 1) / (times[-1] - times[0]),
        "memory_gib": memory_gib,
        "device": device,
    }


def _transformers(directory: Path, prompt: list[int], new: int, threads: int) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    before = rss_gib()
    model = load_directory(directory, "auto" if cuda else "float32")
    model = model.cuda() if cuda else model
    cache = model.generation_config.cache_implementation  # Gemma 2 has one of its own
    greedy = {"do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    times: list[float] = []

    class Clock(BaseStreamer):
        """Told the prompt first, then each token."""

        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def write(count: int) -> float:
        times.clear()
        # No end token: every model writes as many.
        model.generation_config = GenerationConfig(max_new_tokens=count, **greedy)
        given = torch.tensor([prompt], device=model.device)
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=given, attention_mask=torch.ones_like(given), streamer=Clock())
        return begin

    write(_WARM_UP)
    begin = write(new)
    if cuda:
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = highest_gib() - before
    return figures(begin, times[1:], len(times) - 1, memory, "cuda" if cuda else "cpu")


def _llama_cpp(file: Path, prompt: list[int], new: int, threads: int) -> dict[str, Any]:
    before = rss_gib()
    with llama_cpp.opened(file, len(prompt) + new + _WARM_UP, threads) as server:
        _written(server, prompt, _WARM_UP)
        begin = time.perf_counter()
        times, tokens = _written(server, prompt, new)
        memory = highest_gib() - before
    return figures(begin, times, tokens, memory, "cpu")


def _written(server: Any, prompt: list[int], new: int) -> tuple[list[float], int]:
    """When pieces of text came, and how many tokens they were."""
    times: list[float] = []
    said: list[dict[str, Any]] = []

    def heard(chunk: Any) -> bool:
        times.append(time.perf_counter())
        said.append(chunk)
        return False

    asked = {
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    }
    listen: Callable[[Any], bool] = heard
    server.handle_completions(asked, listen)
    if failed := [chunk["error"] for chunk in said if "error" in chunk]:
        raise RuntimeError(f"llama.cpp: {failed[0].get('message')}")
    counts = [chunk["timings"]["predicted_n"] for chunk in said if chunk.get("timings")]
    return times, counts[-1] if counts else len(times)


def highest_gib() -> float:
    """Resident memory of this process at its highest, in GiB; getrusage's peak may be a parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return 0.0


if __name__ == "__main__":
    main()
