"""What a step of recipes/sft.py costs beside NeMo-Aligner called directly: python benchmarks/alignment.py

Two GPTSFTModels with the same weights train in one process, in turns of a few steps: one as the recipe trains it (our
encoded conversations through NeMo's chat data set, our log), one as Aligner's own script does (its chat data set over
NeMo's JSONL format with the same turns, a logger that does nothing). Both see the same tokens, which is checked. Prints
a JSON line with the median seconds of a step, from one call of the logger to the next, and the median over steps of

    overhead = ours / Aligner's - 1

On a CPU that other processes use too, `overhead_cpu_time` is the steadier one. The goal is 0.03.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_minitron import cpu_compat
from nemo_minitron.alignment import loaders, runs, training
from nemo_minitron.alignment.prepared import has_cuda
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.align import AlignConfig
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.chat.conversations import read_conversations
from nemo_minitron.data.chat.encoded import encode_split
from nemo_minitron.data.instruct import Sizes, write_instruct_set
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.workflows.conversations import prepared_tokenizer
from nemo_minitron.workflows.preflight import converted
from nemo_minitron.workflows.sft import run as sft

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """A logger that notes when it is called, before and after it passes the call on."""

    def __init__(self, to: Any = None) -> None:
        self.to = to
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._last: tuple[float, float] | None = None

    def restart(self) -> None:
        self._last = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None, prefix: str = "") -> None:
        if self.to is not None:
            self.to.log_metrics(metrics, step, prefix)
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.wall.append(now[0] - self._last[0])
            self.cpu.append(now[1] - self._last[1])
        self._last = now

    def finalize(self) -> None:
        pass


def nemo_format(source: Path, target: Path) -> None:
    """The same conversations as NeMo's chat data set reads them."""
    rows = []
    for sample in read_conversations(source):
        system = [m["content"] for m in sample.messages if m["role"] == "system"]
        turns = [
            {"from": m["role"].capitalize(), "value": m["content"], "label": None}
            for m in sample.messages
            if m["role"] != "system"
        ]
        rows.append({"system": "".join(system), "mask": "User", "conversations": turns})
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(source: Source, a: argparse.Namespace, directory: Path, tokenizer: Path, file: str) -> Any:
    layout = TrainerConfig(
        micro_batch_size=a.micro_batch_size,
        global_batch_size=a.global_batch_size,
        max_steps=a.steps,
        limit_val_batches=0,
    )
    split = {
        "file_path": file,
        "micro_batch_size": a.micro_batch_size,
        "global_batch_size": a.global_batch_size,
        "max_seq_length": 512,
        "min_seq_length": 1,
        "memmap_workers": 1,
        "index_mapping_dir": str(directory),
    }
    return runs.aligner_config(
        source,
        layout,
        AlignConfig(),
        key="sft",
        directory=directory,
        tokenizer=str(tokenizer),
        seq_length=512,
        max_epochs=1,
        seed=1234,
        cuda=has_cuda(),
        fused=cpu_compat.has_transformer_engine(),
        data={"num_workers": 0, "chat": True, "train_ds": split, "validation_ds": split},
    )


def nemo_dataset(cfg: Any, tokenizer: Any, end: str) -> Any:
    """Aligner's own, with the turn markers of our default template."""
    from nemo_aligner.data.nlp.builders import build_sft_dataset

    markers = {
        "system_turn_start": end,
        "turn_start": end,
        "label_start": "<label>",
        "end_of_turn": "",
        "end_of_name": "\n",
    }
    return build_sft_dataset(
        cfg.model.data.train_ds,
        tokenizer,
        None,
        answer_only_loss=True,
        is_chat=True,
        special_tokens=markers,
        model_cfg=cfg.model,
    )


def trainer_of(cfg: Any, source: Source, dataset_of: Any, clock: Clock) -> tuple[Any, Any]:
    """Aligner's trainer and its data set, nothing done yet."""
    trainer, model = training.open_model(cfg, "sft", sft.model_class, source)
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.utils import train_script_utils as aligner
    from nemo_aligner.utils.distributed import Timer

    dataset = dataset_of(cfg, model.tokenizer)
    loader = loaders.sft_loader(cfg, "train_ds", dataset)
    aligner.init_using_ptl(trainer, model, loader, dataset)
    optimizer, scheduler = aligner.extract_optimizer_scheduler_from_ptl_model(model)
    made = SupervisedTrainer(
        cfg=cfg.trainer.sft,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=None,
        logger=clock,
        ckpt_callback=None,
        run_timer=Timer(None),
    )
    return made, dataset


def same_batches(ours: Any, theirs: Any) -> bool:
    batch = [d.collate_fn([d[i] for i in range(8)]) for d in (ours, theirs)]
    return all(batch[0][k].equal(batch[1][k]) for k in ("tokens", "labels", "loss_mask", "position_ids"))


def measure(a: argparse.Namespace, directory: Path) -> dict[str, Any]:
    source = converted(find_source(a.student, "student"), DataConfig(cache_dir=str(directory)))
    tokenizer_dir = prepared_tokenizer(
        None, source, DataConfig(cache_dir=str(directory)), "align.chat_template"
    )
    files = write_instruct_set(directory / "set", sizes=Sizes(train=a.steps * a.global_batch_size // 4 + 1))
    tokenizer = load_tokenizer(str(tokenizer_dir))
    encoded = encode_split(
        read_conversations(files.train),
        tokenizer,
        name="train",
        seq_length=512,
        overlong="refuse",
        directory=directory / "encoded",
    )
    nemo_format(files.train, directory / "nemo.jsonl")
    clocks = {"ours": Clock(runs.RunLog(directory / "steps.jsonl", write=True, done=0)), "aligner": Clock()}
    end = tokenizer.eos_token
    sides = {
        "ours": (encoded.path, lambda cfg, t: loaders.sft_dataset(cfg, "train_ds", t)),
        "aligner": (str(directory / "nemo.jsonl"), lambda cfg, t: nemo_dataset(cfg, t, end)),
    }
    made = {
        name: trainer_of(
            configuration(source, a, directory / name, tokenizer_dir, file), source, dataset_of, clocks[name]
        )
        for name, (file, dataset_of) in sides.items()
    }
    assert same_batches(made["ours"][1], made["aligner"][1]), "the two sides read different tokens"
    for done in range(a.turn, a.steps + 1, a.turn):
        for name in sides if (done // a.turn) % 2 else reversed(sides):
            made[name][0].max_steps = done
            clocks[name].restart()
            made[name][0].fit()
    return report(clocks)


def report(clocks: dict[str, Clock]) -> dict[str, Any]:
    wall, cpu = (
        {name: statistics.median(getattr(clock, kind)) for name, clock in clocks.items()}
        for kind in ("wall", "cpu")
    )
    # Both sides take the same batches in the same order, and a batch's length says most of what its step takes.
    overhead, overhead_cpu = (
        statistics.median(a / b for a, b in zip(*(getattr(c, kind) for c in clocks.values()), strict=True))
        - 1
        for kind in ("wall", "cpu")
    )
    return {
        "seconds": {name: round(value, 5) for name, value in wall.items()},
        "cpu_seconds": {name: round(value, 5) for name, value in cpu.items()},
        "steps": len(clocks["ours"].wall),
        "overhead": round(overhead, 4),
        "overhead_cpu_time": round(overhead_cpu, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default=str(ROOT / "assets" / "demo-teacher"))
    parser.add_argument("--steps", type=int, default=100, help="of each side")
    parser.add_argument("--turn", type=int, default=10, help="steps of one side before the other's")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=8)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(parser.parse_args(), Path(directory))))


if __name__ == "__main__":
    main()
