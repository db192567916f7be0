"""A few of kill_trials.py's trials; `python -m tests.functional.kill_trials 20` runs as many as one likes."""

import pytest

from tests.functional import kill_trials
from tests.functional.commands import Commands
from tests.functional.conftest import Pruned, Teacher

pytestmark = pytest.mark.slow

# Moments early, in the middle and late; see Random(seed).
SEEDS = {"prune": (4,), "distill": (3, 11)}


@pytest.mark.parametrize("recipe", SEEDS)
def test_killed_at_a_random_moment(recipe: str, commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    subject = (
        kill_trials.pruning(commands, teacher.huggingface)
        if recipe == "prune"
        else kill_trials.distilling(commands, pruned.run_dir, teacher.huggingface, steps=20)
    )
    expected = kill_trials.undisturbed(commands, subject, commands.home / f"undisturbed-{recipe}")
    for seed in SEEDS[recipe]:
        record = kill_trials.trial(commands, subject, expected, seed)
        assert record["same"], record
