"""Everything that is measured on one GPU, as one command of half an hour:

    python benchmarks/gpu/plan.py --model M.gguf --out OUT        # M: `make real-model`
    python benchmarks/gpu/plan.py ... --only parity_cpu parity_gpu            # a part, where a command has a limit
    python benchmarks/gpu/plan.py ... --list                                  # what would run

Parts of it ran on one NVIDIA H200: docs/performance.md, "On a GPU", says which. It needs an environment as `make
setup` makes it, or the machine's own torch with the wheels of `pack.py`; Transformer Engine is not needed. Without
--model only what needs no real weights runs.

Each step is a process of its own with a limit; the limits add up to less than --budget. OUT/steps.jsonl gets a line for
each step (name, exit code, seconds, its own last JSON line), OUT/NAME.log all that it said. A step that fails does not
stop the others. Exit code 1 if any failed. What the figures are for is in docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
VERSIONS = """
import json, logging, torch
logging.basicConfig(level=logging.INFO)
from nemo_minitron import cpu_compat
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name(),
                  "stand_ins": cpu_compat.prepare_nemo()}))
"""


@dataclass(frozen=True)
class Step:
    """One process: its arguments after the interpreter, and its limit in seconds."""

    name: str
    limit_s: int
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


# Llama-3.2-1B's sizes with random weights, and a tokenizer of fewer entries.
MAKE_1B = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
torch.manual_seed(1)
config = LlamaConfig(
    num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0,
    tie_word_embeddings=True, torch_dtype=torch.bfloat16)
LlamaForCausalLM(config).bfloat16().save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained("assets/demo-teacher").save_pretrained(sys.argv[1])
"""


def steps(model: Path | None, out: Path) -> list[Step]:
    """All of them, in the order of what would be missed most."""
    real = real_recipes(model, out) if model else []
    return [
        Step("environment", 60, ["-c", VERSIONS]),
        *parity(),
        *real,
        *whole_steps(),
        *losses(),
        *large(out),
    ]


def parity() -> list[Step]:
    """The same losses (`value_ours`, `value_transformers`) of three distillation steps on the CPU and on the GPU:
    float32, random weights and tokens."""
    arguments = ["benchmarks/steps.py", "distill", "--tokens", "512", "--batch", "2", "--runs", "2"]
    return [
        Step("parity_gpu", 90, arguments),
        Step("parity_cpu", 120, arguments, {"CUDA_VISIBLE_DEVICES": ""}),
    ]


def whole_steps() -> list[Step]:
    """Tokens a second, memory, `tflop` (for the MFU: tflop / wall_s / the card's peak) beside transformers; and a whole
    step beside NeMo's `llm.distill`."""
    made = []
    for size, batch in (("135m", 8), ("1b", 4)):
        for work in ("distill", "train", "forward"):
            arguments = ["benchmarks/steps.py", work, "--size", size, "--bf16"]
            made.append(
                Step(f"step_{work}_{size}", 80, [*arguments, "--tokens", "2048", "--batch", str(batch)])
            )
    sizes = ["--num-layers", "16", "--hidden-size", "1536", "--teacher-hidden-size", "2048", "--bf16"]
    sizes += ["--vocab-size", "128256", "--seq-length", "2048", "--runs", "1"]
    return [*made, Step("nemo_distill", 180, ["benchmarks/distill_step.py", *sizes])]


def losses() -> list[Step]:
    """The loss alone beside ModelOpt's and the four bare products; the goal is 80 % of their rate."""
    sizes = ["--vocab", "128256", "--hidden-size", "3072", "--teacher-hidden-size", "4096", "--runs", "9"]
    return [Step("loss", 60, ["benchmarks/kd_loss.py", "--bf16", "--tokens", "8192", *sizes])]


def real_recipes(model: Path, out: Path) -> list[Step]:
    """The real model through prune, distil and SFT, as the README has it, with more tokens."""
    data = ["data.seq_length=512", "trainer.micro_batch_size=8"]
    tuned = ["align.max_steps=20", "align.optim.warmup_steps=2", "align.optim.lr=1e-4"]
    return [
        Step("prune", 90, pruned("", str(model), out, *data)),
        Step("distill", 120, distilled("", str(model), out, *data, "distill.max_steps=100")),
        Step(
            "sft",
            100,
            [
                *(
                    "recipes/sft.py",
                    "+conf=instruct",
                    f"student={out / 'distilled'}",
                    "align.global_batch_size=8",
                ),
                *(*tuned, "align.limit_val_batches=2", "eval.samples=8", f"run_dir={out / 'tuned'}"),
            ],
        ),
    ]


def large(out: Path) -> list[Step]:
    """A 1B of random weights through prune and distil in bf16-mixed; each step's seconds and memory in steps.jsonl."""
    teacher, bf16 = str(out / "1b"), ["trainer.precision=bf16-mixed", "trainer.micro_batch_size=2"]
    data = ["data.seq_length=2048", *bf16]
    return [
        Step("make_1b", 60, ["-c", MAKE_1B, teacher]),
        Step("prune_1b", 120, pruned("_1b", teacher, out, *data)),
        Step("distill_1b", 150, distilled("_1b", teacher, out, *data, "distill.max_steps=20")),
    ]


def pruned(suffix: str, source: str, out: Path, *more: str) -> list[str]:
    """Arguments of a pruning into OUT/pruned."""
    few = ("prune.calibration_samples=64", "eval.samples=64", f"run_dir={out / 'pruned'}{suffix}")
    return ["recipes/prune.py", "+conf=width", f"source={source}", *more, *few]


def distilled(suffix: str, teacher: str, out: Path, *more: str) -> list[str]:
    """Arguments of a distillation into OUT/distilled."""
    where = (
        f"student={out / 'pruned'}{suffix}",
        f"teacher={teacher}",
        f"run_dir={out / 'distilled'}{suffix}",
    )
    schedule = ("distill.optim.warmup_steps=10", "distill.optim.lr=3e-4", "distill.val_check_interval=50")
    few = ("distill.limit_val_batches=1", "distill.global_batch_size=8", "eval.samples=64")
    return ["recipes/distill.py", "+conf=width", *where, *more, *schedule, *few]


def run(step: Step, out: Path) -> dict[str, Any]:
    """Run one; what it left."""
    begin, log = time.monotonic(), out / f"{step.name}.log"
    with open(log, "w") as opened:
        try:
            code = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path()), **step.environment},
                stdout=opened,
                stderr=subprocess.STDOUT,
                timeout=step.limit_s,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    seconds = round(time.monotonic() - begin, 1)
    return {
        "name": step.name,
        "exit_code": code,
        "seconds": seconds,
        "last_line": lines[-1] if lines else None,
    }


def search_path() -> list[str]:
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps, in the plan's order")
    parser.add_argument(
        "--budget", type=int, default=1800, help="seconds for all; what does not fit is left out"
    )
    parser.add_argument("--list", action="store_true", help="print the steps, run none")
    a = parser.parse_args()
    planned = steps(a.model and a.model.resolve(), a.out.resolve())
    if unknown := set(a.only or []) - {step.name for step in planned}:
        parser.error(f"--only {' '.join(sorted(unknown))}: {', '.join(s.name for s in planned)} are legal")
    planned = [step for step in planned if not a.only or step.name in a.only]
    if a.list:
        for step in planned:
            print(f"{step.name} ({step.limit_s} s): {' '.join(step.arguments)}")
        return 0
    a.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + a.budget, False
    for step in planned:
        if time.monotonic() + step.limit_s > end:
            found: dict[str, Any] = {"name": step.name, "exit_code": None, "last_line": "no time left"}
        else:
            found = run(step, a.out)
        failed = failed or found["exit_code"] != 0
        with open(a.out / "steps.jsonl", "a") as opened:
            opened.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
