"""Random settings and damaged files at the checks of all recipes, in one process.

    python -m tests.fuzz.campaign --overrides 10000 --files 500 --seed 1 --home DIR --report report.json

Each case composes a configuration, parses it and runs the recipe's check: all that comes before a model is loaded. It
must be accepted or refused with an InputError, whose one line names what was given; without another exception, within
a minute of CPU, without 2 GiB, without starting a program or writing outside of DIR. A case is named by seed, campaign
and number, and `--only overrides:17` runs it again.
"""

import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_minitron.pruning import PrunePlan
from nemo_minitron.run.registry import RECIPES
from tests.fuzz import overrides, targets
from tests.fuzz.places import Places, make_places

# A pipeline's check, and a plan's, starts the recipes of its steps, to compose them: programs are what is watched for.
TRIED = [name for name in RECIPES if name not in ("pipeline", "plan_run")]
# They also work on a Hugging Face directory that is not converted.
STREAMED = ("prune", "cache_teacher")

# CPU, since others may use the machine too; what waits, for a pipe say, waits for so many times as long.
SECONDS, WAITING, BYTES, LONGEST_LINE = 60, 4, 2 << 30, 1500
_STARTS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
}
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.symlink",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
}


READERS: dict[str, Callable[[str], Any]] = {"PrunePlan.load": PrunePlan.load}


class TooLong(BaseException):
    """The watchdog's; not an Exception, so that nothing on the way takes it for a refusal."""


class Watch:
    """Notes what the process does while a case runs: programs started, files changed outside of `home`."""

    def __init__(self, home: Path) -> None:
        self.home, self.active, self.seen = str(home.resolve()), False, list[str]()
        sys.addaudithook(self._hook)
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, self._alarm)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        raise TooLong

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        # torch's processes talk to each other over sockets in TMPDIR.
        local = event == "socket.connect" and str(args[1]).startswith(self.home)
        if event in _STARTS and not local:
            self.seen.append(f"{event} {str(args)[:100]}")
            raise RuntimeError(f"a check may not: {event}")
        written = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (written or event in _CHANGES) and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            # Below a device or a file nothing can be made: that is an error to be told, not a change.
            if os.path.isdir(os.path.dirname(path)) and not path.startswith(
                (self.home, "/dev/null", "/proc/self", "/dev/shm")
            ):
                self.seen.append(f"{event} {path}")

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        self.seen.clear()
        self.active = True
        signal.alarm(WAITING * SECONDS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(2 * WAITING * SECONDS, exit=True)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            self.active = False


class Checks:
    """The recipes' checks, each run as often as asked for.

    Args:
        family: of the files that are damaged; None: any.
    """

    def __init__(self, places: Places, family: str | None = None) -> None:
        from hydra import initialize_config_dir

        from tests.unit.test_config import CONF, SCHEMAS

        self.places, self.schemas, self.family = places, SCHEMAS, family
        self.accepted = 0
        assert set(RECIPES) == set(SCHEMAS)
        self.modules = {
            name: importlib.import_module(f"nemo_minitron.workflows.{name}.check") for name in TRIED
        }
        self.keys = {name: sorted(set(overrides.keys(SCHEMAS[name]))) for name in TRIED}
        self.watch = Watch(places.home.parent)
        initialize_config_dir(version_base="1.3", config_dir=str(CONF)).__enter__()

    def fault(self, recipe: str, asked: list[str], names: list[str]) -> str | None:
        """What is wrong with the answer to these settings; None if nothing is.

        Args:
            asked: overrides.
            names: of which a refusal must say one.
        """
        before, begin = _resident(reset=True), time.process_time()
        with self.watch.case():
            code, said = self.answer(recipe, asked)
        self.accepted += code == 0
        seconds, grown = time.process_time() - begin, _resident() - before
        if self.watch.seen:
            return f"did what no check may: {self.watch.seen[0]}"
        if code not in (0, 2):
            return said.strip()
        if seconds > SECONDS or grown > BYTES:
            return f"took {seconds:.0f} s and {grown / 2**20:.0f} MiB"
        return misspoken(said, names) if code == 2 else None

    def answer(self, recipe: str, asked: list[str]) -> tuple[int, str]:
        """Exit code and line of a recipe up to its work; what Hydra itself refuses, `recipe.main` brings into form."""
        from hydra import compose

        from nemo_minitron.config.recipes import parse
        from nemo_minitron.errors import InputError
        from nemo_minitron.run.main import register_resolvers

        if recipe in READERS:
            return self.read(recipe, asked[0])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            register_resolvers(recipe)
            try:
                config = compose(recipe, overrides=[*asked, f"run_dir={self.places.home / 'run_dir'}"])
            except Exception:
                return 2, ""
            try:
                prepared = self.modules[recipe].check(parse(self.schemas[recipe], config))
                prepared.to_config()
            except InputError as error:
                return 2, str(error)
            except BaseException:
                return 1, traceback.format_exc()
        return 0, ""

    def read(self, reader: str, file: str) -> tuple[int, str]:
        """As `answer`, of one of the package's readers."""
        from nemo_minitron.errors import InputError

        try:
            READERS[reader](file)
        except InputError as error:
            return 2, str(error)
        except BaseException:
            return 1, traceback.format_exc()
        return 0, ""


def _resident(*, reset: bool = False) -> int:
    """Peak resident memory in bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def misspoken(line: str, names: list[str]) -> str | None:
    """What is wrong with a refusal that has to be one plain line and name one of these, if any are given."""
    if len(line.splitlines()) > 1 or "Traceback" in line or len(line) > LONGEST_LINE:
        return f"no plain line ({len(line)} characters): {line[:300]!r}"
    if line and names and not any(name and name in line for name in names):
        return f"names none of {names}: {line[:300]!r}"
    return None


def names_of(given: list[str]) -> list[str]:
    """What a refusal of these overrides may name: their keys or their values."""
    found = []
    for override in given:
        key, _, value = override.lstrip("+~").partition("=")
        found += [key, key.split(".")[-1], key.split(".")[0], value.strip("'")[:20]]
        with contextlib.suppress(ValueError):
            found.append(str(float(value)))  # as OmegaConf makes a text of it
    return found


Case = tuple[str, list[str], list[str], str]


def override_case(checks: Checks, rng: random.Random) -> Case:
    """Recipe, all overrides, those that are odd, what was done."""
    recipe = rng.choice(sorted(TRIED))
    given = overrides.draw(rng, checks.keys[recipe], checks.places.odd_paths())
    base = checks.places.base(recipe)
    if recipe in STREAMED and rng.random() < 0.5:
        base = [*checks.places.base(recipe, checks.places.huggingface), "stream=true"]
    return recipe, [*base, *given], given, " ".join(given)[:300]


def file_case(checks: Checks, rng: random.Random) -> Case:
    """As `override_case`, with a damaged file."""
    recipe, asked, done = targets.mutate(rng, checks.places, checks.places.home / "case", checks.family)
    return recipe, asked, [], done


def shrunk(checks: Checks, recipe: str, asked: list[str], given: list[str]) -> list[str]:
    """One odd override that is enough for a fault, where one is."""
    base = asked[: len(asked) - len(given)]
    for one in given:
        if len(given) > 1 and checks.fault(recipe, [*base, one], names_of([one])):
            return [one]
    return given


def run(checks: Checks, kind: str, seed: int, numbers: list[int]) -> list[dict[str, Any]]:
    """The faults of some cases."""
    make: Callable[[Checks, random.Random], Case] = {"overrides": override_case, "files": file_case}[kind]
    found = []
    for done_before, number in enumerate(numbers):
        if done_before % 200 == 199:
            print(f"{kind}: {done_before + 1} done, {len(found)} faults", flush=True)
        recipe, asked, given, done = make(checks, random.Random(f"{seed}/{kind}/{number}"))
        fault = checks.fault(recipe, asked, names_of(given))
        if fault is not None:
            least = shrunk(checks, recipe, asked, given) if given else []
            found.append(
                {"case": f"{kind}:{number}", "recipe": recipe, "done": least or done, "fault": fault}
            )
            brief = str(least or done)[:200]
            print(f"{kind}:{number} {recipe} {brief}: {fault.splitlines()[-1][:300]}", flush=True)
    return found


def main() -> int:
    """Run the campaigns and say what they found; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--overrides", type=int, default=1000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--of", choices=targets.FAMILIES, help="the damaged files: these only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="CAMPAIGN:NUMBER,NUMBER...")
    parser.add_argument("--home", type=Path, required=True, help="a directory of the campaign's own")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    home = options.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    # torch makes its inductor's directory where it is first asked for a compiled function.
    for name in ("TMPDIR", "HF_HOME", "HOME", "NEMO_MINITRON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        (home / "user").mkdir(exist_ok=True)
        os.environ[name] = str(home / "user")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    tempfile.tempdir = os.environ["TMPDIR"]
    begin = time.monotonic()
    checks = Checks(make_places(home / "places"), options.of)
    os.chdir(home / "user")
    for name in TRIED:
        # Not watched: libraries look at the machine when they are first imported.
        code, said = checks.answer(name, checks.places.base(name))
        assert code == 0, (name, said)
    for name, given in targets.undamaged(checks.places, checks.places.home / "case") if options.files else ():
        code, said = checks.answer(name, given)
        assert code == 0, (name, given, said)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * BYTES, size + 2 * BYTES))
    asked = {"overrides": list(range(options.overrides)), "files": list(range(options.files))}
    if options.only:
        kind, _, chosen = options.only.partition(":")
        asked = {kind: [int(number) for number in chosen.split(",")]}
    print(f"seed {options.seed}; ready after {time.monotonic() - begin:.0f} s", flush=True)
    found = [fault for kind, numbers in asked.items() for fault in run(checks, kind, options.seed, numbers)]
    seconds, cpu = time.monotonic() - begin, time.process_time()
    counts = ", ".join(f"{len(numbers)} {kind}" for kind, numbers in asked.items())
    print(
        f"{counts}{f' of {options.of}' if options.of else ''}, {checks.accepted} accepted, {len(found)} faults"
    )
    print(f"{seconds:.0f} s, {cpu:.0f} s of CPU")
    if options.report:
        options.report.write_text(json.dumps(found, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
