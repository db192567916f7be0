"""What a whole distillation step costs beside NeMo 2.4's own: python benchmarks/distill_step.py

Both sides train the same student on the same teacher and packed text, through NeMo's trainer, MegatronStrategy and
optimizer in one process; forward, loss, backward and update are all in the step.

* ours: `DistillTransform` of `nemo_minitron.nemo.distill_transform`;
* nemo: `nemo.collections.llm.distill`, that is ModelOpt's `DistillationModel` and NeMo's `LogitsKLLoss`; with our
  products and attention, or with --plain on torch's products and Megatron-core's attention, as they are without us.

--bf16 is the recipes' bf16-mixed, on a GPU.

The models are Llamas of random weights, made once in a temporary directory; the text is Python's standard library.
Sides take turns, each run in a process of its own; a run's figures are the median step after the first two, and the
peak of memory, the process's or what torch gave out on a GPU. Prints one JSON line with medians over runs, and ratios
ours / nemo.
With --profile a run of each side says where a step's CPU time goes: seconds by kind, and the dearest operations.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import models

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "nemo")
NOT_COUNTED = 2
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_mkl_linear", "aten::mkldnn_linear"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}


def make_model(directory: Path, a: argparse.Namespace, hidden_size: int) -> None:
    """A Llama of random weights as a NeMo 2 directory."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.nemo.huggingface import import_checkpoint

    torch.manual_seed(hidden_size)
    config = LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=a.num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 256),
        max_position_embeddings=a.seq_length,
        tie_word_embeddings=False,
        torch_dtype=torch.float32,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "hf")
    AutoTokenizer.from_pretrained(ROOT / "assets" / "demo-teacher").save_pretrained(directory / "hf")
    converted = import_checkpoint(find_source(directory / "hf"), directory / "cache")
    (directory / "nemo").symlink_to(converted)


def settings(a: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The trainer's layout, the data's and the optimizer's settings, the same for both sides."""
    from nemo_minitron.config.recipes import DataConfig, OptimConfig
    from nemo_minitron.config.trainer import TrainerConfig

    layout = TrainerConfig(
        micro_batch_size=a.micro_batch_size,
        global_batch_size=a.global_batch_size,
        max_steps=a.steps,
        precision="bf16-mixed" if a.bf16 else "32",
    )
    return layout, DataConfig(seq_length=a.seq_length), OptimConfig(warmup_steps=1)


def clock(profile: bool) -> Any:
    """A callback that notes the seconds of each step, and with `profile` the operations of those that count."""
    import lightning.pytorch as pl
    import torch

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

        def on_train_batch_start(self, *_: Any) -> None:
            wait_for_gpu()
            if profile and len(self.seconds) == NOT_COUNTED:
                self.profiler.start()
            self.begin = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            wait_for_gpu()
            self.seconds.append(time.perf_counter() - self.begin)

        def on_train_end(self, *_: Any) -> None:
            if profile:
                self.profiler.stop()

    return Clock()


def wait_for_gpu() -> None:
    """Until it has done what it was given, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most memory that was held at once."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_kind(watch: Any) -> dict[str, Any]:
    """CPU seconds a step by kind of operation, and the dearest operations of the rest."""
    steps = len(watch.seconds) - NOT_COUNTED
    own = {e.key: e.self_cpu_time_total / 1e6 / steps for e in watch.profiler.key_averages()}
    found: dict[str, Any] = {kind: sum(own.pop(name, 0.0) for name in names) for kind, names in KINDS.items()}
    dearest = sorted(own.items(), key=lambda item: -item[1])[:8]
    return {**found, "rest": sum(own.values()), "of the rest": {name: round(s, 3) for name, s in dearest}}


def run_side(a: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train for the steps in this process."""
    from nemo_minitron import cpu_compat
    from nemo_minitron.cpu_compat import product_choice

    cpu_compat.take_products(product_choice.choose())
    cpu_compat.prepare_nemo()
    import nemo.lightning as nl
    from nemo.collections import llm

    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.data.prepare import prepare_data
    from nemo_minitron.nemo import trainer
    from nemo_minitron.nemo.session import nemo_tokenizer

    layout, data, optim = settings(a)
    student, teacher = (find_source(directory / name / "nemo") for name in ("student", "teacher"))
    prepared = prepare_data(data, str(student.tokenizer), None)
    tokenizer, watch = nemo_tokenizer(student.tokenizer), clock(a.profile)
    module = trainer.training_data(prepared.indexed, tokenizer, data, layout, prepared.index_cache)
    trainer.seed_everything(1)
    weights = nl.RestoreConfig(path=str(student.path), load_optim_state=False, load_artifacts=False)
    common = {
        "log": nl.NeMoLogger(explicit_log_dir=tempfile.mkdtemp(dir=directory), ckpt=None),
        "resume": nl.AutoResume(restore_config=weights),
    }
    optimizer = trainer.optimizer(optim, layout)
    if a.side == "ours":
        model, transform = ours(a, student, teacher, tokenizer, optimizer)
        callbacks = [transform, watch]
        llm.train(model, module, trainer.trainer(layout, training=True, callbacks=callbacks), **common)
    else:
        nemos = trainer.trainer(layout, training=True, callbacks=[watch])
        paths = str(student.path), str(teacher.path)
        llm.distill(*paths, module, nemos, optim=optimizer, tokenizer=tokenizer, **common)
    if a.profile:
        return by_kind(watch)
    return {"seconds": statistics.median(watch.seconds[NOT_COUNTED:]), "peak_bytes": peak_bytes()}


def ours(
    a: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any, optimizer: Any
) -> tuple[Any, Any]:
    """The student and what makes a distillation of its training."""
    from nemo_minitron.distillation import LossSettings
    from nemo_minitron.nemo import models as nemo_models
    from nemo_minitron.nemo.distill_transform import DistillTransform

    config = nemo_models.to_config(student.architecture, seq_length=a.seq_length)
    return nemo_models.to_model(config, tokenizer, optimizer), DistillTransform(teacher, LossSettings())


def in_turn(a: argparse.Namespace, directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Each side in processes of its own, one after the other."""
    from nemo_minitron.cpu_compat import attention, product_choice

    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    # Making the models, Lightning took a port and said so in the environment.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    plain = {attention.SWITCH: "megatron", product_choice.SWITCH: "mkl"}
    switches = {"ours": {}, "nemo": plain if a.plain else {}}
    for _ in range(1 if a.profile else a.runs):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--directory", str(directory)]
            ended = subprocess.run(command, capture_output=True, text=True, env=environment | switches[side])
            if ended.returncode:
                sys.exit(f"{side} failed:\n{ended.stderr[-3000:]}")
            found[side].append(json.loads(ended.stdout.splitlines()[-1]))
    return found


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(
        parser,
        num_layers=4,
        hidden_size=512,
        teacher_hidden_size=768,
        vocab_size=32000,
        seq_length=512,
        micro_batch_size=2,
        global_batch_size=4,
        steps=8,
        runs=3,
    )
    parser.add_argument("--plain", action="store_true", help="NeMo's side without our products and attention")
    parser.add_argument("--profile", action="store_true", help="where a step's CPU time goes, one run a side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    a = arguments().parse_args()
    if a.side:
        print(json.dumps(run_side(a, a.directory)))
        return
    with tempfile.TemporaryDirectory() as name:
        for model, hidden_size in (("student", a.hidden_size), ("teacher", a.teacher_hidden_size)):
            (Path(name) / model).mkdir()
            make_model(Path(name) / model, a, hidden_size)
        found = in_turn(a, Path(name))
    if a.profile:
        for side, (kinds,) in found.items():
            print(json.dumps({"side": side, "plain": a.plain, **kinds}))
        return
    line: dict[str, Any] = {key: value for key, value in vars(a).items() if key not in ("side", "directory")}
    for key, unit in (("seconds", "step_s"), ("peak_bytes", "peak_bytes")):
        medians = {side: statistics.median(run[key] for run in found[side]) for side in SIDES}
        ratios = [o[key] / n[key] for o, n in zip(found["ours"], found["nemo"], strict=True)]
        line |= {f"{unit}_{side}": round(medians[side], 4) for side in SIDES}
        line[f"{key}_ratio"] = round(statistics.median(ratios), 4)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
