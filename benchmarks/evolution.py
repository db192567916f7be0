"""Two specialists of one teacher merged, by search and without: python benchmarks/evolution.py --home DIR

For each seed the demo teacher is tuned on two parts of a corpus (matplotlib's code, and transformers' models), and
`recipes/evolve.py` merges the two by LM loss on both parts: in parameter space, in data-flow space, and in both in
turn. Held-out files of both parts, half each, say how good each is. `--students`: the specialists are students
instead, pruned from the teacher once and distilled from it on one part each. Prints the table in Markdown; a run that
is there already is not made again.
"""

import argparse
import json
import os
import runpy
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PARTS = {"plots": ("matplotlib", "*.py"), "models": ("transformers", "models/*/modeling_*.py")}
FILES, BYTES, HELD_OUT = 40, 30_000, 5  # of a part; of each file at most; every so many


def corpus(home: Path) -> None:
    """DIR/{plots,models,both}/{train,valid}: as many files of either part, each cut at the same length."""
    for part, (package, pattern) in PARTS.items():
        found = find_spec(package)
        assert found is not None
        assert found.origin is not None
        files = sorted(f for f in Path(found.origin).parent.glob(pattern) if f.stat().st_size >= BYTES)
        for number, file in enumerate(files[:FILES]):
            split = "valid" if number % HELD_OUT == 0 else "train"
            for name in (part, "both"):
                place = home / name / split
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{part}{number:02}.py").write_bytes(file.read_bytes()[:BYTES])


def recipe(home: Path, name: str, run: str, *overrides: str) -> dict[str, Any]:
    """A run of DIR and its result, by a fork of this process, which has imported NeMo once for all."""
    result = home / run / "result.json"
    if not result.exists():
        pid = os.fork()
        if pid == 0:
            sys.argv = [str(ROOT / "recipes" / f"{name}.py"), *overrides, f"run_dir={home / run}"]
            code: Any = 1
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                os._exit(code if isinstance(code, int) else 1)
        assert os.waitpid(pid, 0)[1] == 0, run
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def text(home: Path, part: str) -> list[str]:
    return [
        "data=files",
        *(f"data.{split}={home}/{part}/{split}/*.py" for split in ("train", "valid")),
        *("data.seq_length=128", "trainer.micro_batch_size=8"),
    ]


def trained(home: Path, part: str, seed: int, steps: int, *, students: bool) -> Path:
    """A specialist's run, and what it costs: `steps` of 8 sequences."""
    run = f"{'student' if students else 'specialist'}-{part}-{seed}"
    schedule = [f"distill.max_steps={steps}", "distill.global_batch_size=8", "distill.optim.warmup_steps=5"]
    schedule += [f"distill.val_check_interval={steps}", "distill.limit_val_batches=1"]
    schedule += [f"seed={seed}", f"data.seed={seed}", "eval.samples=16", *text(home, part)]
    if students:
        recipe(home, "distill", run, f"student={home}/pruned", "distill=demo", *schedule)
    else:
        recipe(home, "correct_teacher", run, "distill.optim.lr=5e-4", "distill.optim.min_lr=5e-5", *schedule)
    return home / run


def rows_of(result: dict[str, Any], space: str) -> dict[str, float]:
    rows = {name: both["held_out"] for name, both in result["compared"].items()}
    for stage, both in result["evolved"].items():
        turn = space == "both" and stage == "layers"
        rows["evolved: parameters, then layers" if turn else f"evolved: {stage}"] = both["held_out"]
    return rows


def seed_of(home: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Held-out losses by name, in nats a token."""
    models = [str(trained(home, part, seed, options.steps, students=options.students)) for part in PARTS]
    base = home / "pruned" if options.students else ROOT / "assets" / "demo-teacher"
    common = [
        f"models=[{','.join(models)}]",
        "license=none",
        f"seed={seed}",
        f"eval.samples={options.held_out}",
    ]
    common += [f"evolve.{key}={getattr(options, key)}" for key in ("generations", "population", "samples")]
    kind, rows = "students" if options.students else "specialists", {}
    for space, more in {
        "both": [f"base={base}", "merge=dare_ties", "evolve.groups=2"],
        "layers": ["merge=linear"],
    }.items():
        own = [f"evolve.space={space}", *more, *common, *text(home, "both")]
        rows |= rows_of(recipe(home, "evolve", f"{kind}-{space}-{seed}", *own), space)
    return {name.replace(f"-{seed} (", " ("): loss for name, loss in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--students", action="store_true")
    options = parser.parse_args()
    import nemo_minitron.nemo.fit
    import nemo_minitron.nemo.session

    assert nemo_minitron.nemo.fit
    home = options.home.absolute()
    corpus(home)
    if options.students:
        half = ["+conf=width", "prune.calibration_samples=64", "eval.samples=16", *text(home, "both")]
        recipe(home, "prune", "pruned", *half)
    tables = [seed_of(home, seed, options) for seed in options.seeds]
    print(f"| held-out loss, nats a token | {' | '.join(f'seed {s}' for s in options.seeds)} | mean |")
    print("|---|" + "---|" * (len(tables) + 1))
    for name in tables[0]:
        losses = [table[name] for table in tables]
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in losses)} | {statistics.mean(losses):.3f} |")


if __name__ == "__main__":
    main()
