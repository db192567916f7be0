"""How long what is left of the study will take: as long as the same run with another seed, or as it is estimated."""

import statistics
from collections.abc import Sequence

from benchmarks.study.home import Home
from benchmarks.study.rows import Row, Run
from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.sizes import sizes_of
from nemo_minitron.planning.memory import Training
from nemo_minitron.pruning.target import resolve_target

# CPU seconds of a run beside its steps: imports, conversion, losses before and after, checkpoints.
_AROUND_S = {"demo": 30.0, "real": 200.0}
# Of the demo teacher's 128 texts, a fourth of what docs/synthetic_text.md has measured.
_WRITING_S = 116.0


def hours_left(home: Home, row: Row, seeds: Sequence[int]) -> float:
    """CPU hours of a row's runs that are not finished."""
    seconds = 0.0
    for run in home.study.runs_of(row):
        missing = sum(home.result(run, seed) is None for seed in seeds)
        if missing:
            seconds += missing * _run_seconds(home, run, seeds)
    return seconds / 3600


def _run_seconds(home: Home, run: Run, seeds: Sequence[int]) -> float:
    """Of one, by those of other seeds, or by what `recipes/plan_run.py` would measure of its step here and now."""
    taken = [home.record(run, seed)["cpu_s"] for seed in seeds if home.result(run, seed) is not None]
    if taken:
        return statistics.fmean(taken)
    writing = _WRITING_S if run.recipe == "synthesize" else 0.0
    return _AROUND_S[home.study.name] + writing + run.trained_steps * _step_seconds(home, run)


def _step_seconds(home: Home, run: Run) -> float:
    """Of a training step of the width student, which others are near."""
    if not run.trained_steps:
        return 0.0
    # It imports NeMo: only where something is to be estimated.
    from nemo_minitron.workflows.plan_run import calibration

    study = home.study
    teacher = sizes_of(study.teacher).architecture
    student: Architecture = teacher
    if run.recipe == "distill":
        student = resolve_target(teacher, {"hidden_size": "3/4", "ffn_hidden_size": "9/14"})
    alone = "distill.loss=cross_entropy" in run.overrides or run.recipe == "correct_teacher"
    batch, length = study.batch, study.length
    training = Training(
        student, None if alone else teacher, run.trained_steps, batch, length, on_states=not alone
    )
    return calibration.step_seconds(training, batch)
