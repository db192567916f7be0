"""What writing an export costs beside `cp` of the result: python benchmarks/export.py --directory DIR

Writes a Llama with random bfloat16 weights (over 2 GiB by default; DIR needs twice as much) as a Hugging Face directory
and as an F16 GGUF file, and copies each result with cp, in turns, both ended by fsync. Weights come from memory, one
layer's for all, so that writing alone is measured. Prints a JSON line for each format, with medians over the runs:

    ratio = seconds of writing / seconds of cp right before and after it (their mean)

The goals are 2 for Hugging Face and 3 for GGUF. `writer_peak_gib` is what the writer's memory grew by over what it had
before the first tensor (VmHWM); the goal is twice the largest tensor and 1 GiB.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import models
from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.data.tokenizer import train_bpe
from nemo_minitron.export import gguf_model, huggingface
from nemo_minitron.export.gguf_tokenizer import vocabulary_of
from nemo_minitron.export.tensors import Weights
from tests.support.stacked_weights import stacked


class Memory:
    """Reads as `export.distributed_reader.DistributedReader` does, from one layer's weights for all layers."""

    def __init__(self, arch: Architecture) -> None:
        one = stacked(arch.replace(num_layers=1))
        self.layers = arch.num_layers
        self.tensors = {name: tensor.to(torch.bfloat16) for name, tensor in one.items()}

    def read(self, key: str, begin: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """A box of a tensor."""
        found = self.tensors[key]
        begin = (0, *begin[1:]) if ".layers." in key else begin
        for axis, (first, length) in enumerate(zip(begin, size, strict=True)):
            found = found.narrow(axis, first, length)
        return found.clone()


def made(place: Path, arch: Architecture) -> huggingface.Model:
    """The weights, and a tokenizer on the disk."""
    text = [Path(file).read_text() for file in sorted(Path(os.__file__).parent.glob("*.py"))[:60]]
    train_bpe(text, 1024, place / "tokenizer")
    weights = Weights(arch, Memory(arch))  # type: ignore[arg-type]
    return huggingface.Model(weights, config_of(arch, 2048), place / "tokenizer", torch.bfloat16)


def in_a_child(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a function, and by how many GiB its memory grew, in a process of its own (fork)."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        before, begin = _status("VmRSS"), time.perf_counter()
        work()
        took = time.perf_counter() - begin
        os.write(writing, json.dumps([took, (_status("VmHWM") - before) / 2**20]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(child, 0)
    took, grown = json.loads(text)
    return took, grown


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])  # KiB


def copied(source: Path, to: Path) -> float:
    """Seconds of cp and fsync."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    _sync(to)
    took = time.perf_counter() - begin
    shutil.rmtree(to)
    return took


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def measure(model: huggingface.Model, what: str, place: Path, runs: int) -> dict[str, Any]:
    """One format: writing and copying in turns; the first time warms up."""
    settings = huggingface.generation_settings(model.tokenizer, model.weights.architecture.vocab_size)
    tokenizer = huggingface.load_tokenizer(model.tokenizer, model.weights.architecture.vocab_size)
    rows = model.weights.architecture.vocab_size
    result = place / what

    def write() -> None:
        if what == "hf":
            huggingface.write(model, result, huggingface.SHARD_BYTES)
        else:
            gguf_model.write(model, vocabulary_of(tokenizer, settings, rows, what), result / "a.gguf", "F16")
        _sync(result)

    def once() -> tuple[float, float]:
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        return in_a_child(write)

    once()
    seen = []
    for _ in range(runs):
        before = copied(result, place / "copy")
        took, grown = once()
        seen.append((took, (before + copied(result, place / "copy")) / 2, grown))
    size = sum(file.stat().st_size for file in result.iterdir())
    shutil.rmtree(result)
    largest = max(part.shape[0] * part.shape[-1] for part in model.weights.parts.values()) * 4
    return {
        "what": what,
        "gib": round(size / 2**30, 3),
        "write_s": round(statistics.median(row[0] for row in seen), 2),
        "cp_s": round(statistics.median(row[1] for row in seen), 2),
        "ratio": round(statistics.median(row[0] / row[1] for row in seen), 2),
        "writer_peak_gib": round(max(row[2] for row in seen), 3),
        "largest_tensor_gib_in_float32": round(largest / 2**30, 3),
        "threads": torch.get_num_threads(),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(parser, num_layers=24, hidden_size=2048, kv_channels=128, vocab_size=32768)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.directory) as place:
        model = made(Path(place), models.architecture(a).replace(model_type="llama"))
        for what in ("hf", "gguf"):
            print(json.dumps(measure(model, what, Path(place), a.runs)), flush=True)


if __name__ == "__main__":
    main()
