"""What a distillation loss costs, with output layers and backward: python benchmarks/kd_loss.py --tokens N --vocab V

Each side takes the same hidden states and the same Megatron output layers (`ColumnParallelLinear`) of student and
teacher, and leaves gradients in the student's hidden states and weight:

* ours: `nemo_minitron.distillation.distillation_loss`;
* modelopt: both layers' logits, ModelOpt's `LogitsKLLoss`, the masked mean, backward;
* plain: both layers' logits, torch's `log_softmax` and `kl_div` (one rank only);
* products: the four matrix products alone, `torch.mm` on chunks of 256 tokens (of all tokens on CUDA) into memory that
  is there already: what any loss has to do, with nothing of the loss.

Prints one JSON line: medians over runs in which the sides take turns; seconds; bytes held at once beyond weights,
inputs and the student's weight gradient, on rank 0; the loss of each; and ratios `ours / other`. A side that does not
fit in memory is left out, with the bytes that it would take (ModelOpt: eight float32 [tokens, V/tp], as measured where
it fits). --tp 2 starts two gloo ranks. --sweep writes a CSV and a picture over tokens and vocabularies:

    python benchmarks/kd_loss.py --sweep docs/kd_loss
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import memory, models
from nemo_minitron import cpu_compat

SIDES = ("ours", "modelopt", "plain", "products")
# Tensors of tokens x vocabulary, float32, that a side holds at its peak.
BUFFERS = {"ours": 0, "modelopt": 8, "plain": 5, "products": 0}


class Sides:
    """The inputs, and the work of each side on them."""

    def __init__(self, a: argparse.Namespace) -> None:
        from megatron.core.transformer.transformer_config import TransformerConfig

        self.a, self.dtype = a, torch.bfloat16 if a.bf16 else torch.float32
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=a.hidden_size,
            num_attention_heads=8,
            tensor_model_parallel_size=a.tp,
            use_cpu_initialization=False,
            params_dtype=self.dtype,
            gradient_accumulation_fusion=False,
        )
        torch.manual_seed(0)
        self.student, self.teacher = self._layer(a.hidden_size), self._layer(a.teacher_hidden_size)
        torch.manual_seed(1)  # all ranks have the same states
        self.x = self._states(a.hidden_size).requires_grad_()
        self.y = self._states(a.teacher_hidden_size)
        self.mask = torch.ones(1, a.tokens, device=self.x.device)

    def _layer(self, hidden_size: int) -> Any:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        return ColumnParallelLinear(
            hidden_size,
            self.a.vocab,
            config=self.config,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=0.02),
            bias=False,
        )

    def _states(self, hidden_size: int) -> Tensor:
        states = torch.randn(self.a.tokens, 1, hidden_size, device=models.device())
        return states.to(self.dtype)

    def forget(self) -> None:
        """Drop the gradients of the run before."""
        self.x.grad = self.student.weight.grad = None

    def ours(self) -> Tensor:
        from nemo_minitron.distillation import HiddenTeacher, LossSettings, distillation_loss

        teacher = HiddenTeacher(self.y, self.teacher.weight)
        sums = distillation_loss(
            self.x, self.student.weight, teacher, self.mask, LossSettings(), vocab_size=self.a.vocab
        )
        return self._backward(sums.loss / sums.tokens)

    def modelopt(self) -> Tensor:
        from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

        with torch.no_grad():
            teacher = self.teacher(self.y)[0]
        by_token = LogitsKLLoss(self.config)(self.student(self.x)[0], teacher)[0]
        if self.a.tp > 1:
            by_token = reduce_from_tensor_model_parallel_region(by_token)
        return self._backward((by_token * self.mask).sum() / self.mask.sum())

    def plain(self) -> Tensor:
        from torch.nn import functional

        with torch.no_grad():
            teacher = functional.linear(self.y, self.teacher.weight).float().log_softmax(-1)
        student = functional.linear(self.x, self.student.weight).float().log_softmax(-1)
        by_token = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        return self._backward((by_token.t() * self.mask).sum() / self.mask.sum())

    def products(self) -> Tensor:
        x, y = self.x.detach()[:, 0], self.y[:, 0]
        student, teacher = self.student.weight.detach(), self.teacher.weight.detach()
        for begin in range(0, len(x), self.chunk):
            rows = slice(begin, min(begin + self.chunk, len(x)))
            logits = self.buffers[0][: rows.stop - begin], self.buffers[1][: rows.stop - begin]
            torch.mm(x[rows], student.t(), out=logits[0])
            torch.mm(y[rows], teacher.t(), out=logits[1])
            torch.mm(logits[0], student, out=self.buffers[2][rows])
            if begin:
                self.buffers[3].addmm_(logits[0].t(), x[rows])
            else:
                torch.mm(logits[0].t(), x[rows], out=self.buffers[3])
        return torch.tensor(torch.nan)

    def make_buffers(self) -> None:
        """What `products` writes to."""
        self.chunk = self.a.tokens if self.x.is_cuda else min(256, self.a.tokens)
        columns = len(self.student.weight)
        shapes = (self.chunk, columns), (self.chunk, columns), self.x.shape[::2], self.student.weight.shape
        self.buffers = [self.x.detach().new_empty(shape) for shape in shapes]

    @staticmethod
    def _backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss.detach()


def needed_bytes(a: argparse.Namespace, side: str) -> int:
    """About what a side takes at its peak, on all ranks."""
    return BUFFERS[side] * 4 * a.tokens * a.vocab + 4 * a.vocab * a.hidden_size


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, in this process."""
    sides, found = Sides(a), dict[str, Any]()
    fits = [s for s in SIDES if needed_bytes(a, s) < memory.available_bytes() * 0.95]
    chosen = [s for s in fits if s in a.sides and not (s == "plain" and a.tp > 1)]
    weight_gradient = sides.student.weight.numel() * sides.student.weight.element_size()
    work: dict[str, Callable[[], Tensor]] = {side: getattr(sides, side) for side in chosen}
    for side in chosen:
        if side == "products":
            sides.make_buffers()
        sides.forget()
        losses: list[Tensor] = []
        held = memory.peak_bytes(lambda: losses.append(work[side]()))  # noqa: B023
        if side != "products":
            found |= {f"bytes_{side}": held - weight_gradient, f"loss_{side}": float(losses[0])}
    times: dict[str, list[float]] = {side: [] for side in chosen}
    for _ in range(a.runs):
        for side in chosen:
            sides.forget()
            if a.tp > 1:
                torch.distributed.barrier()
            times[side].append(models.seconds(work[side])[0])
    found |= {f"seconds_{side}": statistics.median(times[side]) for side in chosen}
    if "modelopt" in a.sides and "modelopt" not in fits:
        found["bytes_modelopt_computed"] = BUFFERS["modelopt"] * 4 * a.tokens * a.vocab // a.tp
    return found | ratios(found, times)


def ratios(found: dict[str, Any], times: dict[str, list[float]]) -> dict[str, float]:
    """ours / other: medians of the runs' own ratios, and of bytes."""
    result = {}
    for side in SIDES[1:]:
        if side in times and "ours" in times:
            each = [ours / other for ours, other in zip(times["ours"], times[side], strict=True)]
            result[f"time_ratio_{side}"] = statistics.median(each)
        other = found.get(f"bytes_{side}", found.get(f"bytes_{side}_computed"))
        if other and "bytes_ours" in found:
            result[f"bytes_ratio_{side}"] = found["bytes_ours"] / other
    return result


def rank_main(rank: int, a: argparse.Namespace, directory: str) -> None:
    """One rank's part; rank 0 writes the answer into the directory."""
    threads = torch.get_num_threads() if a.tp == 1 else max(1, torch.get_num_threads() // a.tp)
    torch.set_num_threads(threads)
    cpu_compat.prepare_megatron()
    models.process_group(rank, a.tp, directory)
    found = measure(a)
    if rank == 0:
        line = {
            "device": models.device_name(),
            "threads_per_rank": threads,
            **{name: getattr(a, name) for name in ("tokens", "vocab", "hidden_size", "teacher_hidden_size")},
            "tp": a.tp,
            "dtype": "bfloat16" if a.bf16 else "float32",
            "runs": a.runs,
            **{key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()},
        }
        Path(directory, "line.json").write_text(json.dumps(line))
    torch.distributed.destroy_process_group()


def once(a: argparse.Namespace) -> dict[str, Any]:
    """Measure in processes of their own, so that nothing of an earlier size is held."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(rank_main, (a, directory), nprocs=a.tp)
        return json.loads(Path(directory, "line.json").read_text())


def sweep(a: argparse.Namespace) -> dict[str, Any]:
    """Every number of tokens under every vocabulary, into a CSV and a picture; the last line returns."""
    from benchmarks import pictures

    lines = []
    for vocab in a.vocabs:
        for tokens in a.token_counts:
            lines.append(once(argparse.Namespace(**{**vars(a), "tokens": tokens, "vocab": vocab})))
            print(json.dumps(lines[-1]), flush=True)
            pictures.write_csv(Path(f"{a.sweep}.csv"), lines)
    pictures.kd_loss(Path(f"{a.sweep}.png"), lines)
    return lines[-1]


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_sizes(parser, tokens=1024, vocab=128256, hidden_size=768, teacher_hidden_size=1024, tp=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--sweep", help="write this path with .csv and .png")
    parser.add_argument("--token-counts", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--vocabs", type=int, nargs="+", default=[32000, 128256])
    return parser


def main() -> None:
    a = arguments().parse_args()
    print(json.dumps(sweep(a) if a.sweep else once(a)))


if __name__ == "__main__":
    main()
