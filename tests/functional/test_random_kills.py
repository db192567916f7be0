"""A few of kill_trials.py's trials; `python -m tests.support.kill_trials 20` runs as many as one likes."""

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support import kill_trials
from tests.support.commands import Commands

pytestmark = [pytest.mark.slow, pytest.mark.alone]

# Moments early, in the middle and late; see Random(seed). test_kills.py waits for those that matter.
SEEDS = {"prune": (4,), "distill": (3,), "sft": (5,)}
ATTEMPTS = 3


@pytest.mark.parametrize("recipe", SEEDS)
def test_killed_at_a_random_moment(recipe: str, commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    subject = {
        "prune": lambda: kill_trials.pruning(commands, teacher.huggingface),
        "distill": lambda: kill_trials.distilling(commands, pruned.run_dir, teacher.huggingface, steps=20),
        "sft": lambda: kill_trials.tuning(commands, pruned.run_dir, steps=20),
    }[recipe]()
    expected = kill_trials.undisturbed(commands, subject, commands.home / f"undisturbed-{recipe}")
    for first in SEEDS[recipe]:
        # A run that was faster than the first one may be done before the kill comes.
        for seed in range(first, first + 100 * ATTEMPTS, 100):
            record = kill_trials.trial(commands, subject, expected, seed)
            assert record["same"], record
            if record["killed"]:
                break
        assert record["killed"], record
