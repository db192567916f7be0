"""An 8B pruned on a small machine: python benchmarks/full_size.py --home DIR

Writes a model of Llama-3.1-8B's sizes with random bfloat16 weights (16 GB, once), and prunes it by
`recipes/prune.py +conf=llama31_8b/width stream=true` and by depth, in turns with `cp` and fsync of as many bytes. DIR
needs 26 GB: results are removed in turn. Prints a JSON line for each preset, with medians over the runs:

    ratio = seconds of the whole command / seconds of cp right before and after it (their mean)

The goals are 1.5, and 2 GiB for `peak_anonymous_gib`, the most memory of the process that no file backs (RssAnon, read
every 20 ms). A student's sizes are read off its files, some of its tensors are compared with the source's at the plan's
indices, and one run is killed and typed again: its files must have the bytes of the run before.

With `--score N` the model is scored layer by layer instead, over N samples of 512 tokens: every axis, block influence
and the loss. `hours` is what 32 layers and 1,024 samples would take at the median layer's pace, `cpu_hours` what they
would work, which other programs on the machine hardly change; `--layers 4` is enough.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors import safe_open

from nemo_minitron.checkpoints.families import architecture_of
from nemo_minitron.checkpoints.weight_files import read_headers
from nemo_minitron.export.safetensors_writer import write_shards
from nemo_minitron.export.tensors import parts
from nemo_minitron.files import file_sha256

ROOT = Path(__file__).resolve().parent.parent
# config.json of Llama-3.1-8B.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
PRESETS = {"width": 4.51, "depth": 4.54}  # billions of parameters (arXiv 2408.11796, table 3)
_SHARD_BYTES = 10**9
_BLOCK = 1 << 24  # values
_SAMPLED = 4  # layers that are compared


def made(place: Path, layers: int) -> Path:
    """The model: random weights, norms near 1, the tokenizer of the demo teacher."""
    if (place / "made").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(ROOT / "assets" / "demo-teacher" / name, place)
    config = CONFIG | {"num_hidden_layers": layers}
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes = {part.name: part.shape for part in parts(architecture_of(config, "the model"))}
    write_shards(place, shapes, torch.bfloat16, _SHARD_BYTES, lambda name: random(name, shapes[name]))
    (place / "made").touch()
    return place


def random(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Rows in bfloat16: of either sign, from 2^-7 to 2^-6 (norms: 1 to 2), seeded by the tensor's name."""
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    rows = max(1, _BLOCK // shape[-1])
    exponent = 0x3F80 if "norm" in name else 0x3C00
    mask = 0x007F if "norm" in name else 0x807F
    for begin in range(0, shape[0], rows):
        size = (min(rows, shape[0] - begin), *shape[1:])
        bits = draw.integers(0, 1 << 16, size, dtype=np.uint16) & np.uint16(mask) | np.uint16(exponent)
        yield torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


# ---- one command ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """What a command took: `anonymous`, in bytes."""

    wall_s: float
    anonymous: int


def command(model: Path, preset: str, run_dir: Path) -> list[str]:
    """As a user types it."""
    own = [f"+conf=llama31_8b/{preset}", f"source={model}", "stream=true", "shard_size=500MB"]
    by = ["prune.importance=random"] if preset == "width" else _depth(model)
    return [sys.executable, str(ROOT / "recipes" / "prune.py"), *own, *by, f"run_dir={run_dir}"]


def _depth(model: Path) -> list[str]:
    """The preset's layers are for 32; of fewer layers the same share goes, right before the last."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return [] if layers == 32 else [f"prune.num_layers={layers // 2}", "prune.drop_layers=late"]


def run(line: list[str], killed_when: Callable[[], bool] = lambda: False) -> Ended:
    """Run a command to its end, or until SIGKILL ends it."""
    begin, anonymous, killed = time.perf_counter(), 0, False
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    os.set_blocking(process.stderr.fileno(), False)
    while process.poll() is None:
        anonymous = max(anonymous, _anonymous(process.pid))
        with contextlib.suppress(TypeError):  # nothing was said
            said.append(process.stderr.read() or "")
        if killed_when():
            process.kill()
            killed = True
            break
        time.sleep(0.02)
    code = process.wait()
    if code != (-signal.SIGKILL if killed else 0):
        sys.exit(f"{' '.join(line)} ended with {code}: {''.join(said)[-2000:]}")
    return Ended(time.perf_counter() - begin, anonymous)


def _anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def copied(model: Path, size: int, place: Path) -> float:
    """Seconds that cp and fsync take for `size` bytes: measured on whole files of about as many, and scaled."""
    files, total = [], 0
    for file in sorted(model.glob("*.safetensors")):
        if total + file.stat().st_size / 2 < size:
            files.append(file)
            total += file.stat().st_size
    place.mkdir(exist_ok=True)
    begin = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(place)], check=True)
    for file in place.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    took = time.perf_counter() - begin
    shutil.rmtree(place)
    return took * size / total


# ---- what came of it -----------------------------------------------------------------------------------------


def verified(model: Path, run_dir: Path) -> dict[str, Any]:
    """The student's parameters by its files, and how many tensors were compared with the source's at the plan's
    indices."""
    plan = json.loads((run_dir / "plan.json").read_text())["kept"]
    student = run_dir / "checkpoint"
    headers = read_headers(student, "the student")
    layers = 1 + max(int(name.split(".")[2]) for name in headers if ".layers." in name)
    every = list(range(layers)) if plan["layers"] is None else plan["layers"]
    sampled = sorted({round(i * (layers - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)})
    names = [name for name in headers if ".layers." not in name]
    names += [name for name in headers if ".layers." in name and int(name.split(".")[2]) in sampled]
    for name in names:
        _compare(model, student, name, plan, every)
    return {
        "parameters": sum(int(np.prod(header.shape)) for header in headers.values()),
        "tensors": len(headers),
        "tensors_compared": len(names),
    }


def _compare(model: Path, student: Path, name: str, plan: Any, every: list[int]) -> None:
    """By plain indexing of some rows of the source's tensor."""
    origin, layer = name, None
    if ".layers." in name:
        layer = int(name.split(".")[2])
        origin = name.replace(f"layers.{layer}.", f"layers.{every[layer]}.")
    neurons = None if layer is None or plan["ffn_hidden_size"] is None else plan["ffn_hidden_size"][layer]
    channels = plan["hidden_size"]
    writes = any(part in name for part in ("o_proj", "down_proj", "norm"))
    rows = channels if writes else neurons if "gate" in name or "up_proj" in name else None
    columns = (
        None if "norm" in name else neurons if "down_proj" in name else None if "o_proj" in name else channels
    )
    new, old = _tensor(student, name), _tensor(model, origin)
    for row in range(0, new.shape[0], 997 if new.dim() > 1 else 1):
        expected = old[row if rows is None else rows[row]]
        expected = expected if columns is None else expected[columns]
        if not torch.equal(new[row], expected):
            sys.exit(f"{name}: row {row} is not what the plan says")


def _tensor(directory: Path, name: str) -> torch.Tensor:
    with safe_open(read_headers(directory, "it")[name].file, "pt") as opened:
        return opened.get_tensor(name)


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of the student's files."""
    return {file.name: file_sha256(file) for file in sorted((run_dir / "checkpoint").iterdir())}


def measure(model: Path, preset: str, home: Path, runs: int) -> dict[str, Any]:
    """One preset, in turns with cp; at the end a run that is killed and typed again."""
    run_dir, ended, found = home / f"run-{preset}", [], {}
    arch = architecture_of(json.loads((model / "config.json").read_text()), "the model")
    size = 2 * int(PRESETS[preset] / 8.03 * arch.parameters())
    copies = [copied(model, size, home / "copy")]
    sums: dict[str, str] = {}
    for number in range(runs):
        ended.append(run(command(model, preset, run_dir)))
        if number == runs - 1:
            found, sums = verified(model, run_dir), digests(run_dir)
            _check_size(found["parameters"], preset, arch.num_layers)
        size = json.loads((run_dir / "result.json").read_text())["weight_bytes"]
        shutil.rmtree(run_dir)
        copies.append(copied(model, size, home / "copy"))
    beside = [(a + b) / 2 for a, b in pairwise(copies)]
    return {
        "preset": preset,
        "gb_in": round(sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e9, 2),
        "gb_out": round(size / 1e9, 2),
        **found,
        "prune_s": _median([e.wall_s for e in ended]),
        "cp_s": _median(beside),
        "ratio": _median([e.wall_s / cp for e, cp in zip(ended, beside, strict=True)]),
        "peak_anonymous_gib": round(max(e.anonymous for e in ended) / 2**30, 3),
        "runs": runs,
        **resumed(model, preset, run_dir, sums),
    }


def _check_size(parameters: int, preset: str, layers: int) -> None:
    """Of the whole model's student, in billions, against the paper's."""
    if layers == 32 and round(parameters / 1e9, 2) != PRESETS[preset]:
        sys.exit(f"{preset}: {parameters} parameters, but it should be {PRESETS[preset]} billions")


def resumed(model: Path, preset: str, run_dir: Path, expected: dict[str, str]) -> dict[str, Any]:
    """Kill a run after its second file of weights, and type it again."""
    line = command(model, preset, run_dir)
    unfinished = run_dir / ".checkpoint.tmp"
    killed = run(line, killed_when=lambda: len(list(unfinished.glob("*.safetensors"))) > 1)
    if (run_dir / "result.json").exists():
        sys.exit("it ended before its second file was seen: nothing to go on with")
    again = run(line)
    kept = json.loads((run_dir / "result.json").read_text())["weight_files_kept"]
    same = digests(run_dir) == expected
    shutil.rmtree(run_dir)
    if not same or kept < 2:
        sys.exit("the killed run ended with other bytes, or began anew")
    return {
        "killed_after_s": round(killed.wall_s, 1),
        "files_kept": kept,
        "went_on_for_s": round(again.wall_s, 1),
        "same_bytes": same,
    }


def scored(model: Path, home: Path, samples: int) -> dict[str, Any]:
    """Score the model on the standard library's text, prune it by what came of it, and estimate the whole."""
    run_dir = home / "run-scores"
    own = [f"prune.calibration_samples={samples}", "eval.samples=1", f"data.cache_dir={home / 'cache'}"]
    sizes = ["data.seq_length=512", "trainer.micro_batch_size=1"]
    line = [sys.executable, str(ROOT / "recipes" / "prune.py"), "+conf=llama31_8b/width", f"source={model}"]
    ended = run([*line, "stream=true", "shard_size=500MB", *own, *sizes, f"run_dir={run_dir}"])
    result = json.loads((run_dir / "result.json").read_text())
    shutil.rmtree(run_dir)
    took = {"hours": result["layer_s"], "cpu_hours": result["layer_cpu_s"]}
    # Each layer takes one sample of held-out text besides.
    all_of_it = 1024 * 32 / (samples + 1) / 3600
    return {
        "scored": samples,
        "layer_s": result["layer_s"],
        "layer_cpu_s": result["layer_cpu_s"],
        **{key: round(statistics.median(layers) * all_of_it, 1) for key, layers in took.items()},
        "lm_loss_nats_before": result["lm_loss_nats_before"],
        "lm_loss_nats_after": result["lm_loss_nats_after"],
        "peak_anonymous_gib": round(ended.anonymous / 2**30, 3),
        "wall_s": round(ended.wall_s, 1),
    }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


def main() -> None:
    """Parse the arguments, make the model, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="of the model; fewer to try it out")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=PRESETS)
    parser.add_argument("--score", type=int, metavar="N", help="samples; score the model instead")
    parser.add_argument("--keep-model", action="store_true")
    a = parser.parse_args()
    begin = time.perf_counter()
    model = made(a.home / f"llama-{a.layers}-layers", a.layers)
    print(json.dumps({"model": str(model), "made_s": round(time.perf_counter() - begin, 1)}), flush=True)
    if a.score:
        print(json.dumps(scored(model, a.home, a.score)), flush=True)
    for preset in () if a.score else (a.only,) if a.only else PRESETS:
        print(json.dumps(measure(model, preset, a.home, a.runs)), flush=True)
    if not a.keep_model:
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
