"""What writing an export costs beside `cp` of the result: python benchmarks/export.py --directory DIR

Writes a Llama with random bfloat16 weights (over 2 GiB by default; DIR needs twice as much) as a Hugging Face directory
and as an F16 GGUF file, and copies each result with cp, in turns, both ended by fsync. Weights lie in memory, one
layer's for all, so that writing alone is measured. Prints a JSON line for each format, with medians over the runs:

    ratio = seconds of writing / seconds of cp right before and after it (their mean)

The goals are 2 for Hugging Face and 3 for GGUF. `writer_peak_gib` is what the writer's memory grew by over what it had
before the first tensor (VmHWM); the goal is twice the largest tensor and 1 GiB. `write_cpu_s` and `cp_cpu_s` are a
processor's seconds, the kernel's included: these stay where other work slows the disk and takes the processors.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
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
        return found


def made(place: Path, arch: Architecture) -> huggingface.Model:
    """The weights, and a tokenizer on the disk."""
    text = [Path(file).read_text() for file in sorted(Path(os.__file__).parent.glob("*.py"))[:60]]
    train_bpe(text, 1024, place / "tokenizer")
    weights = Weights(arch, Memory(arch))  # type: ignore[arg-type]
    return huggingface.Model(weights, config_of(arch, 2048), place / "tokenizer", torch.bfloat16)


@dataclass(frozen=True)
class Cost:
    """Seconds, those of a processor, and by how many GiB memory grew."""

    wall_s: float
    cpu_s: float
    grown_gib: float = 0.0


def in_a_child(work: Callable[[], None]) -> Cost:
    """The cost of a function in a process of its own (fork)."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        before, begin, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
        work()
        took = time.perf_counter() - begin, time.process_time() - cpu
        os.write(writing, json.dumps([*took, (_status("VmHWM") - before) / 2**20]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(child, 0)
    return Cost(*json.loads(text))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])  # KiB


def copied(source: Path, to: Path) -> Cost:
    """The cost of cp and fsync."""
    begin, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    _sync(to)
    took, after = time.perf_counter() - begin, os.times()
    shutil.rmtree(to)
    return Cost(took, sum(after[:4]) - sum(before[:4]))


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

    def once() -> Cost:
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        return in_a_child(write)

    once()
    written, copies = [], [copied(result, place / "copy")]
    for _ in range(runs):
        written.append(once())
        copies.append(copied(result, place / "copy"))
    size = sum(file.stat().st_size for file in result.iterdir())
    shutil.rmtree(result)
    largest = max(part.shape[0] * part.shape[-1] for part in model.weights.parts.values()) * 4
    beside = [(a.wall_s + b.wall_s) / 2 for a, b in pairwise(copies)]
    ratios = [cost.wall_s / cp for cost, cp in zip(written, beside, strict=True)]
    return {
        "what": what,
        "gib": round(size / 2**30, 3),
        "write_s": _median(cost.wall_s for cost in written),
        "cp_s": _median(beside),
        "ratio": _median(ratios),
        "write_cpu_s": _median(cost.cpu_s for cost in written),
        "cp_cpu_s": _median(cost.cpu_s for cost in copies),
        "writer_peak_gib": round(max(cost.grown_gib for cost in written), 3),
        "largest_tensor_gib_in_float32": round(largest / 2**30, 3),
        "threads": torch.get_num_threads(),
        "runs": runs,
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(parser, num_layers=24, hidden_size=2048, kv_channels=128, vocab_size=32768)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", choices=("hf", "gguf"))
    a = parser.parse_args()
    # OpenMP's threads do not live on in a forked process, which would wait for them for ever.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=a.directory) as place:
        model = made(Path(place), models.architecture(a).replace(model_type="llama"))
        for what in (a.only,) if a.only else ("hf", "gguf"):
            print(json.dumps(measure(model, what, Path(place), a.runs)), flush=True)


if __name__ == "__main__":
    main()
