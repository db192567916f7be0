"""What every recipe shares: Hydra around it, exit codes, the run directory, `result.json`.

Exit codes: 0 done; 2 bad input, one line, before any work; 1 a failure while running; 75 told to end, a checkpoint was
saved, start it again; 130 ended by Ctrl-C. HYDRA_FULL_ERROR=1 shows tracebacks for bad input too.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron import __version__, cpu_compat, progress
from nemo_minitron.config import by_size
from nemo_minitron.config.recipes import CommonConfig, SchemaT, parse
from nemo_minitron.cpu_compat import imports, product_choice
from nemo_minitron.environment import COMPOSE, INTERRUPTED, INTERRUPTED_BY_USER, PREPARE, PYTHON, RESULT, rank
from nemo_minitron.errors import FailedRun, InputError, InterruptedRun
from nemo_minitron.files import write_text
from nemo_minitron.run import job_spec, orphans, overrides, sweep, terminal
from nemo_minitron.run.closing import closing_line
from nemo_minitron.run.help_text import help_text
from nemo_minitron.run.lock import LOCK, check_writable, claim, make
from nemo_minitron.run.registry import resources

CONFIGURATION = "config.yaml"
_NO_SPACE = 32 * 2**20  # bytes


def register_resolvers(name: str, schema: type[Any] = CommonConfig) -> None:
    """What configurations may ask.

    `${repository:}`: where conf/ and assets/ are: the checkout, or the installed package. `${recipe:}`: the recipe's
    name. `${run_directory:x}`: a sweep's directory for its running job, else x. `${for_recipe:[a,b],x,y}`: x in
    recipes a and b, else y. `${streamed:x,y}`: x where stream=true, else y. `${with_code:allowed,[a],[b]}`: with b
    where what a model wrote may be run. `${help:}`: what the keys mean.

    Args:
        name: of the recipe that runs.
        schema: its schema.
    """
    answers: dict[str, Callable[..., Any]] = {
        "repository": lambda: str(resources()),
        "recipe": lambda: name,
        "run_directory": lambda otherwise: sweep.directory() or otherwise,
        "for_recipe": lambda names, value, otherwise: value if name in names else otherwise,
        "streamed": lambda value, otherwise, *, _root_: value if _root_.get("stream") else otherwise,
        "with_code": lambda allowed, names, more: [*names, *more] if allowed else names,
        "help": lambda: help_text(name, schema),
    }
    for key, answer in answers.items():
        OmegaConf.register_new_resolver(key, answer, replace=True)


def main(
    name: str,
    schema: type[SchemaT],
    check: Callable[[SchemaT], Any],
    run: Callable[[SchemaT, Any, Path], dict[str, Any]],
) -> None:
    """Compose the configuration of recipe `name`, check it, run it.

    Args:
        name: of the primary configuration, conf/NAME.yaml.
        check: everything that can be refused before a model is loaded, and what is prepared once for all ranks
            (conversion, indices). Its return value is handed to `run`.
        run: the work; returns the fields of `result.json`.

    What `check` returns has a method `to_config`: plain values by which the launcher's ranks find it again.
    """
    started = False
    orphans.end_with_launcher()
    orphans.end_children_with_this_process()
    imports.defer()
    terminal.quiet()
    progress.take_interrupts()
    _submit_if_asked()
    register_resolvers(name, schema)
    typed = sys.argv[1:]
    the_run = _Run(name, schema, check, run, typed)

    @hydra.main(version_base="1.3", config_path=str(resources() / "conf"), config_name=name)
    def task(config: DictConfig) -> None:
        nonlocal started
        started = True
        sys.argv[1:] = typed
        terminal.quiet()
        if sweep.is_sweep():
            sweep.in_its_own_process(lambda: the_run.carry_out(config))
        else:
            the_run.carry_out(config)

    with _refusals(lambda: started):
        compose = COMPOSE in os.environ
        sys.argv[1:] = overrides.for_hydra(name, schema, typed, compose=compose)  # type: ignore[arg-type]
        task()


@contextlib.contextmanager
def _refusals(started: Callable[[], bool]) -> Iterator[None]:
    """What goes wrong before the recipe has `started` is the command line's fault: one line, exit code 2."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(terminal.Tee(stderr, started)):
            yield
    except SystemExit as stop:
        if started() or not stop.code:
            raise
        _refuse(_composition_error(stderr.getvalue()))
    except InputError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _interrupted("before the run began")
    except BrokenPipeError:  # `... --help | head`
        os._exit(128 + signal.SIGPIPE)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        # With HYDRA_FULL_ERROR=1 Hydra leaves its exceptions to us; a sweep's directory may not be writable.
        if started():
            raise
        _refuse(_composition_error(str(error)))


def _submit_if_asked() -> None:
    """`python recipes/X.py ... +cluster=NAME` is `launchers/slurm.sh recipes/X.py ... +cluster=NAME`."""
    if COMPOSE in os.environ or not any(a.startswith("+cluster=") for a in sys.argv[1:]):
        return
    launcher = resources() / "launchers" / "slurm.sh"
    if not launcher.is_file():
        _refuse("+cluster: jobs are submitted from a clone of the repository, with launchers/slurm.sh")
    os.environ.setdefault(PYTHON, sys.executable)
    os.execv(launcher, [str(launcher), *sys.argv])


def _composition_error(message: str) -> str:
    """Hydra refused an unknown preset, group or key: what it says, without its advice and without its own frames."""
    for advice in ("Config search path", "Set the environment variable", "See https://hydra.cc", "full_key:"):
        message = message.partition(advice)[0]
    if "Traceback (most recent call last)" in message:
        message = message.strip().splitlines()[-1]
    return message


def _refuse(line: str) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
    print("error:", " ".join(line.split()), file=sys.stderr, flush=True)
    _leave(2)


def _interrupted(where: str) -> None:
    if rank() == 0:
        print(f"\ninterrupted: {where}", file=sys.stderr, flush=True)
    _leave(INTERRUPTED_BY_USER)


def _leave(code: int) -> None:
    """Exit at once: threads and process groups of a failed rank must not keep it, and others wait for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and code:
        os._exit(code)
    sys.exit(code)


class _Run:
    """One recipe, and what its user typed."""

    def __init__(self, name: str, schema: Any, check: Any, run: Any, typed: Sequence[str]) -> None:
        self.name, self.schema, self.check, self.run, self.typed = name, schema, check, run, typed

    def carry_out(self, config: DictConfig) -> None:
        """From a composed configuration to the end of the process; every way of ending has its exit code."""
        begin = time.monotonic()
        directory = ""
        if COMPOSE not in os.environ:  # in a sweep of a launcher Hydra would log into it
            terminal.log_to_stderr()
        try:
            config = overrides.with_home(config)
            if file := os.environ.get(COMPOSE):
                _check_unfinished(job_spec.hand_over(config, self.schema, Path(file)))
                return
            parsed = parse(self.schema, config)
            directory = parsed.run_dir
            fields = self._work(config, parsed, Path(directory))
        except InputError as error:
            _refuse(str(error))
        except InterruptedRun as stop:
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
            _leave(INTERRUPTED)
        except FailedRun as error:
            print(f"error: {error}; {directory} keeps what was finished", file=sys.stderr)
            _leave(1)
        except (KeyboardInterrupt, SystemExit, Exception) as error:
            if progress.asked_to_end():
                _interrupted(self._how_to_go_on(directory))
            if isinstance(error, SystemExit):
                raise
            traceback.print_exc()
            print(f"error: {_failure(directory, error)}", file=sys.stderr)
            _leave(1)
        else:
            terminal.let_trackers_end()
            if fields is not None and rank() == 0:
                print(closing_line(fields), flush=True)
                fields["wall_s"] = round(time.monotonic() - begin, 2)
                print(write_result(Path(directory), fields), flush=True)
            _end_group()

    def _work(self, config: DictConfig, parsed: Any, directory: Path) -> dict[str, Any] | None:
        """The fields of the result; None where only preparing was asked for."""
        if parsed.cluster is not None:
            raise InputError("cluster: launchers/slurm.sh submits; here nothing would")
        _check_unfinished(parsed)
        product_choice.choose()  # a wrong environment variable is refused before any work
        if rank() == 0:
            check_writable(directory)
            if (directory / LOCK).exists():  # at once, before a long check
                claim(directory)
        prepared = self.check(parsed)
        by_size.keep(config, parsed)
        if rank() == 0:
            self._take(directory, config)
        choice = product_choice.settle(directory, write=rank() == 0)
        if os.environ.get(PREPARE) == "1":
            write_text(directory / "resolved.yaml", OmegaConf.to_yaml(_resolved(config, prepared)))
            print(directory.resolve(), flush=True)
            return None
        cpu_compat.take_products(choice)
        progress.measure_bars_steadily()
        return {**self.run(parsed, prepared, directory), "cpu_products": str(choice)}

    def _take(self, directory: Path, config: DictConfig) -> None:
        """From here on the run directory is this run's: its configuration is kept, an older result goes."""
        make(directory)
        claim(directory)
        if (directory / RESULT).exists():  # overwritten, not gone on with
            (directory / product_choice.RECORD).unlink(missing_ok=True)
        (directory / RESULT).unlink(missing_ok=True)
        terminal.log_to_file(directory / f"{self.name}.log")
        if config.get("prepared") is None:
            command = shlex.join(["python", f"recipes/{self.name}.py", *self.typed]).replace("\n", "\\n")
            head = f"# {command}\n# nemo_minitron {__version__}\n"
            write_text(directory / CONFIGURATION, head + OmegaConf.to_yaml(config))

    def _how_to_go_on(self, directory: str) -> str:
        if not directory or not Path(directory, LOCK).exists():
            return "before the run began"
        how = "" if overrides.given(self.typed, "run_dir") else f" with run_dir={directory}"
        return f"{directory} keeps what was finished; the same command{how} goes on from there"


def _failure(directory: str, error: BaseException) -> str:
    """What went wrong, where a traceback hides it: of a full disk torch only says that writing failed."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(directory).free
        if free < _NO_SPACE:
            return (
                f"the run failed: no space left on the disk of {directory} ({free / 2**20:.1f} MiB); "
                f"{directory} keeps what was finished"
            )
    kept = f"; {directory} keeps what was finished" if directory and Path(directory).is_dir() else ""
    return f"the run failed: {terminal.first_line(error)}{kept}"


def _end_group() -> None:
    """Leave the process group: a gloo rank that exits inside it may abort in its threads."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _resolved(config: DictConfig, prepared: Any) -> DictConfig:
    """What the ranks are started with: nothing left to compose, to convert or to index."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return OmegaConf.create({**plain, "prepared": prepared.to_config(), **job_spec.HYDRA_WRITES_NOTHING})


def _check_unfinished(parsed: CommonConfig) -> None:
    with contextlib.suppress(OSError):  # `check_writable` says what is wrong with the path
        if os.path.exists(os.path.join(parsed.run_dir, RESULT)) and not parsed.overwrite:
            raise InputError(
                f"run_dir={parsed.run_dir}: already holds a result; choose another or say overwrite=true"
            )


def write_result(directory: Path, fields: dict[str, Any]) -> Path:
    """Write RUN/result.json atomically: its presence is what says that a run is finished."""
    return write_text((directory / RESULT).resolve(), json.dumps(fields, indent=2, sort_keys=True) + "\n")
