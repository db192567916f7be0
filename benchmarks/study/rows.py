"""The rows of the study: questions, their arms, and the runs of the recipes that make each arm."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo-teacher"


@dataclass(frozen=True)
class Run:
    """One run of a recipe. In `overrides` "@NAME" stands for the run directory of another run of the same seed."""

    name: str
    recipe: str
    overrides: tuple[str, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the runs that it reads."""
        return tuple(text.partition("=@")[2] for text in self.overrides if "=@" in text)

    @property
    def trained_steps(self) -> int:
        """Of training; 0 where it does not train."""
        given = dict(text.partition("=")[::2] for text in self.overrides)
        return int(given.get("distill.max_steps", 0))


@dataclass(frozen=True)
class Claim:
    """`better` has the lower loss, as `said` in the papers."""

    better: str
    worse: str
    said: str


@dataclass(frozen=True)
class Row:
    """A question: `arms` by name, each the name of the run that it ends with, all after equally many tokens."""

    name: str
    asks: str
    arms: Mapping[str, str]
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Study:
    """One teacher's rows.

    Attributes:
        common: overrides of every run.
        runs: all, by name.
        batch: sequences of a step of training; length: tokens of each.
        measured: the run whose `lm_loss_nats_before` is the teacher's loss on a seed's text.
    """

    name: str
    teacher: str
    common: tuple[str, ...]
    runs: Mapping[str, Run]
    rows: tuple[Row, ...]
    batch: int
    length: int
    measured: str = "width"

    def runs_of(self, row: Row) -> Iterator[Run]:
        """All that a row needs, each once, after those that it reads."""
        seen: set[str] = set()
        for name in (self.measured, *row.arms.values()):
            yield from self._chain(name, seen)

    def chain(self, name: str) -> Iterator[Run]:
        """A run after all that it needs, each once."""
        seen: set[str] = set()
        yield from self._chain(name, seen)

    def _chain(self, name: str, seen: set[str]) -> Iterator[Run]:
        if name in seen:
            return
        seen.add(name)
        for needed in self.runs[name].needs:
            yield from self._chain(needed, seen)
        yield self.runs[name]


def _schedule(steps: int) -> list[str]:
    """Of every training: a tenth of it is warm-up, and it is validated once."""
    return [
        f"distill.max_steps={steps}",
        f"distill.optim.warmup_steps={max(steps // 10, 1)}",
        f"distill.val_check_interval={steps}",
        "distill.limit_val_batches=1",
    ]


def _distil(name: str, student: str, steps: int, *more: str, teacher: str = "") -> Run:
    """A distillation; `teacher`: what stands after `teacher=`; of next tokens alone none is named."""
    given = [f"student=@{student}", *_schedule(steps), *more]
    if "distill.loss=cross_entropy" not in more and "distill=sdg" not in more:
        given.append(f"teacher={teacher}")
    return Run(name, "distill", tuple(given))


_CE, _SCRATCH = "distill.loss=cross_entropy", "distill.from_scratch=true"
_ORIGINS = (
    Claim("pruned, KD", "pruned, CE", "KD alone is best (2407.14679, T15)"),
    Claim("pruned, CE", "random init, KD", "pruned before random init (T14: 2.049 and 3.953 with KD)"),
    Claim("random init, KD", "random init, CE", "KD also from random weights"),
)


def demo(steps: int) -> Study:
    """On the demo teacher, in minutes a run.

    Args:
        steps: of every arm, of 8 sequences of 256 tokens.
    """
    teacher, half = str(DEMO), max(steps // 2, 1)
    runs = [
        Run("width", "prune", ("+conf=width",)),
        Run("random", "prune", ("+conf=width", "prune.importance=random")),
        Run("block", "prune", ("+conf=depth",)),
        Run("influence", "prune", ("prune=depth", "prune.num_layers=4")),
        Run("removal", "prune", ("prune=depth", "prune.num_layers=4", "prune.layer_metric=lm_loss")),
        Run("half", "prune", ("+conf=width", "prune.hidden_size=168", "prune.ffn_hidden_size=416")),
        Run("corrected", "correct_teacher", tuple(_schedule(steps))),
        Run("text", "synthesize", ("synthesize.samples=128",)),
        _distil("kd", "width", steps, teacher=teacher),
        _distil("ce", "width", steps, _CE),
        _distil("random_kd", "random", steps, teacher=teacher),
        _distil("random_ce", "random", steps, _CE),
        _distil("scratch_kd", "width", steps, _SCRATCH, teacher=teacher),
        _distil("scratch_ce", "width", steps, _SCRATCH, _CE),
        *(_distil(f"{name}_kd", name, steps, teacher=teacher) for name in ("block", "influence", "removal")),
        _distil("block_states", "block", steps, "distill=demo_intermediate", teacher=teacher),
        _distil("reverse", "width", steps, "distill.loss=reverse_kl", teacher=teacher),
        _distil("jensen", "width", steps, "distill.loss=jensen_shannon", teacher=teacher),
        _distil("both", "width", steps, "distill.ce_weight=1.0", teacher=teacher),
        _distil("states", "width", steps, "distill=demo_intermediate", teacher=teacher),
        _distil("top_k", "width", steps, "distill.top_k=64", teacher=teacher),
        _distil("of_corrected", "width", steps, teacher="@corrected"),
        _distil("sdg", "width", steps, "distill=sdg", "sdg=@text"),
        _distil("sdg_kd", "width", steps, "distill=sdg_kd", "sdg=@text", teacher=teacher),
        _distil("mixed", "width", steps, "distill=sdg_mixed", "sdg=@text", teacher=teacher),
        _distil("first", "half", half, teacher=teacher),
        Run(
            "again",
            "prune",
            ("source=@first", "prune=width", "prune.hidden_size=144", "prune.ffn_hidden_size=320"),
        ),
        _distil("second", "again", steps - half, teacher=teacher),
    ]
    common = ("data.seq_length=256", "eval.samples=64", "trainer.micro_batch_size=8")
    return Study("demo", teacher, common, {run.name: run for run in runs}, _demo_rows(), 8, 256)


def _demo_rows() -> tuple[Row, ...]:
    kl = "forward KL alone 2.107"
    return (
        Row(
            "origin",
            "What a student begins with, and what it learns from",
            {
                "pruned, KD": "kd",
                "pruned, CE": "ce",
                "random pruning, KD": "random_kd",
                "random pruning, CE": "random_ce",
                "random init, KD": "scratch_kd",
                "random init, CE": "scratch_ce",
            },
            (*_ORIGINS, Claim("pruned, KD", "random pruning, KD", "importance before chance")),
        ),
        Row(
            "shape",
            "Width or depth, at equal parameters (2.07M and 2.02M)",
            {"width": "kd", "depth, by block": "block_kd", "depth, by block, with states": "block_states"},
            (
                Claim("width", "depth, by block", "width before depth up to 15B (best practice 4)"),
                Claim(
                    "depth, by block, with states",
                    "depth, by block",
                    "states help deep cuts (best practice 6)",
                ),
            ),
        ),
        Row(
            "layers",
            "Which layers go, four of eight",
            {"block before the last": "block_kd", "block influence": "influence_kd", "LM loss": "removal_kd"},
            (
                Claim("LM loss", "block influence", "PPL 2.155, BI 2.177 (T14)"),
                Claim(
                    "LM loss",
                    "block before the last",
                    "scattered layers by LM loss have the lower LM loss (P2)",
                ),
            ),
        ),
        Row(
            "losses",
            "Which loss",
            {
                "forward KL": "kd",
                "reverse KL": "reverse",
                "Jensen-Shannon": "jensen",
                "CE + KL": "both",
                "KL + states": "states",
                "top 64 with tail": "top_k",
            },
            (
                Claim("forward KL", "reverse KL", "2.155 and 2.665 (T16)"),
                Claim("forward KL", "CE + KL", f"{kl}, with CE 2.117 (T15)"),
                Claim("forward KL", "top 64 with tail", "k up to 100 hurts; without a tail there"),
            ),
        ),
        Row(
            "correction",
            "A teacher that was corrected on the corpus first",
            {"corrected": "of_corrected", "as it was": "kd"},
            (Claim("corrected", "as it was", "6 % lower (P2), on another corpus than the teacher's"),),
        ),
        Row(
            "text",
            "Text that the teacher wrote",
            {"KD on the corpus": "kd", "SDG": "sdg", "KD on its text": "sdg_kd", "KD on both": "mixed"},
            (Claim("KD on both", "SDG", "they complement each other (NVIDIA's blog)"),),
        ),
        Row(
            "steps",
            "One pruning, or two with a distillation between",
            {"one": "kd", "two": "second"},
            (Claim("two", "one", "prune and distil iteratively (best practice 1)"),),
        ),
    )


def real(source: str, steps: int) -> Study:
    """On SmolLM2-135M-Instruct or a model of its size, with docs/distillation.md's settings of it.

    Args:
        source: the checkpoint.
        steps: of every arm, of one sequence of 512 tokens.
    """
    scoring = (f"source={source}", "prune.calibration_samples=64", "trainer.micro_batch_size=4")
    small = ("distill.global_batch_size=1", "trainer.micro_batch_size=1")
    rate = ("distill.optim.lr=3e-4", "distill.optim.min_lr=3e-6")

    def learns(name: str, student: str, *more: str, rate: tuple[str, ...] = rate) -> Run:
        return _distil(name, student, steps, *more, *small, *rate, teacher=source)

    higher = ("distill.optim.lr=1e-3", "distill.optim.min_lr=1e-5")
    runs = [
        Run("width", "prune", ("+conf=width", *scoring)),
        Run("depth", "prune", ("prune=depth", "prune.num_layers=1/2", *scoring)),
        learns("kd", "width"),
        learns("ce", "width", _CE),
        learns("both", "width", "distill.ce_weight=0.5"),
        learns("scratch_kd", "width", _SCRATCH),
        learns("scratch_ce", "width", _SCRATCH, _CE),
        learns("scratch_both", "width", _SCRATCH, "distill.ce_weight=0.5", rate=higher),
        learns("depth_kd", "depth"),
    ]
    common = ("data.seq_length=512", "eval.samples=64")
    return Study("real", source, common, {run.name: run for run in runs}, _real_rows(), 1, 512)


def _real_rows() -> tuple[Row, ...]:
    return (
        Row(
            "real_origin",
            "What a student of 81M begins with, and what it learns from",
            {
                "pruned, KD": "kd",
                "pruned, CE": "ce",
                "random init, KD": "scratch_kd",
                "random init, CE": "scratch_ce",
                "random init, KD + CE / 2, 1e-3": "scratch_both",
            },
            _ORIGINS,
        ),
        Row(
            "real_losses",
            "The teacher's predictions alone, or half of the next-token loss beside them",
            {"KD": "kd", "KD + CE / 2": "both"},
            (Claim("KD", "KD + CE / 2", "forward KL alone 2.107, with CE 2.117 (T15)"),),
        ),
        Row(
            "real_shape",
            "Width or depth, at equal parameters (81M)",
            {"width": "kd", "depth, by block influence": "depth_kd"},
            (Claim("width", "depth, by block influence", "width before depth up to 15B"),),
        ),
    )
