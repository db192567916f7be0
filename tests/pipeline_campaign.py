"""Kills a small pipeline at random moments; typed again, each has to come to what an undisturbed one came to:

    python -m tests.pipeline_campaign --home DIR [--trials 5] [--seed N]

From the repository's root. A trial is given by its seed; a line of JSON says the moment, and whether all was the same.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from tests.functional.conftest import Teacher
from tests.functional.test_pipeline import kill, made, overrides
from tests.support.commands import Commands


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    a = parser.parse_args()
    a.home.mkdir(parents=True, exist_ok=True)
    commands, export = Commands(a.home, a.home / "cache"), a.home / "teacher-hf"
    ended = commands.pretrain(a.home / "teacher", "trainer.max_steps=10", f"export_dir={export}")
    teacher = Teacher(a.home / "teacher", export, ended, ended.result())
    straight = a.home / "straight"
    first = commands.run("pipeline", *overrides(commands, teacher, straight))
    first.result()
    expected, wrong, trials, seed = made(straight), 0, 0, a.seed
    while trials < a.trials:
        share = random.Random(seed).uniform(0.02, 0.95)
        run_dir = a.home / f"killed-{seed}"
        asked = overrides(commands, teacher, run_dir)
        if kill(commands, asked, share * first.seconds):
            trials += 1
            same = commands.run("pipeline", *asked).code == 0 and made(run_dir) == expected
            wrong += not same
            print(json.dumps({"seed": seed, "share": round(share, 3), "same": same}), flush=True)
        seed += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
