"""What every recipe shares: Hydra around it, exit codes, the run directory, `result.json`, progress.

Exit codes: 0 done; 2 bad input, one line, before any work; 1 a failure while running; 75 told to end, a checkpoint was
saved, start it again. HYDRA_FULL_ERROR=1 shows tracebacks for bad input too.
"""

import contextlib
import io
import json
import logging
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron import handover
from nemo_minitron.claim import LOCK, claim
from nemo_minitron.config import CommonConfig, SchemaT, parse
from nemo_minitron.errors import FailedRun, InputError, InterruptedRun
from nemo_minitron.hosts import imports

RESULT = "result.json"
INTERRUPTED = 75
_NO_SPACE = 32 * 2**20  # bytes
_ROOT = Path(__file__).resolve().parent.parent


# Libraries that greet at INFO level, or warn of what is not installed, whenever they are imported.
_TALKATIVE = ("pytorch_lightning", "lightning", "nemo", "NeMo", "megatron", "datasets", "matplotlib", "root")
_EXPECTED = (
    ".*pynvml.*",
    ".*Apex is not installed.*",
    ".*Transformer Engine and Apex.*",
    ".*transformer_engine.*",
)


def _quiet() -> None:
    """Leave the terminal to progress and results; NEMO_MINITRON_VERBOSE=1 shows everything."""
    if os.environ.get("NEMO_MINITRON_VERBOSE") == "1":
        return
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    for handler in logging.getLogger().handlers:
        # Not levels of loggers: the libraries set those again when they are imported.
        handler.addFilter(
            lambda record: record.levelno >= logging.ERROR or record.name.split(".")[0] not in _TALKATIVE
        )


def rank() -> int:
    """This process's rank as the launcher set it, 0 where there is none."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def register_resolvers(name: str) -> None:
    """What configurations may ask.

    `${repository:}`: the checkout that the recipe was started from. `${for_recipe:[a,b],x,y}`: x in recipes a and b,
    else y. `${unless:x,y}`: nothing where x is given, else y.

    Args:
        name: of the recipe that runs.
    """
    OmegaConf.register_new_resolver("repository", lambda: str(_ROOT), replace=True)
    OmegaConf.register_new_resolver(
        "for_recipe", lambda names, value, otherwise: value if name in names else otherwise, replace=True
    )
    OmegaConf.register_new_resolver(
        "unless", lambda given, value: value if given is None else None, replace=True
    )


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
    imports.defer()
    _quiet()
    _submit_if_asked()
    sys.argv[1:] = [_quoted(override) for override in sys.argv[1:]]
    register_resolvers(name)

    @hydra.main(version_base="1.3", config_path=str(_ROOT / "conf"), config_name=name)
    def task(config: DictConfig) -> None:
        nonlocal started
        started = True
        _quiet()
        _carry_out(config, schema, check, run)

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(_Tee(stderr, lambda: started)):
            task()
    except SystemExit as stop:
        if started or not stop.code:
            raise
        _refuse(_composition_error(stderr.getvalue()))
    except (HydraException, OmegaConfBaseException) as error:
        # With HYDRA_FULL_ERROR=1 Hydra leaves its exceptions to us.
        if started:
            raise
        _refuse(_composition_error(str(error)))


def _submit_if_asked() -> None:
    """`python recipes/X.py ... +cluster=NAME` is `launchers/slurm.sh recipes/X.py ... +cluster=NAME`."""
    if handover.VARIABLE in os.environ or not any(a.startswith("+cluster=") for a in sys.argv[1:]):
        return
    launcher = str(_ROOT / "launchers" / "slurm.sh")
    os.environ.setdefault("NEMO_MINITRON_PYTHON", sys.executable)
    os.execv(launcher, [launcher, *sys.argv])


def _composition_error(message: str) -> str:
    """Hydra refused an unknown preset, group or key: what it says, without its advice."""
    for advice in ("Config search path", "Set the environment variable", "See https://hydra.cc", "full_key:"):
        message = message.partition(advice)[0]
    return message


def _quoted(override: str) -> str:
    """`source=run/step=29-last` as Hydra wants it: NeMo names its checkpoints so, and enroot its images
    `nvcr.io#nvidia/nemo:25.07`, but an unquoted value has neither '=' nor '#'.
    """
    key, _, value = override.partition("=")
    if (
        not re.search("[=#]", value)
        or not re.fullmatch(r"[\w./@+~]+", key)
        or re.search(r"""[\s\\'"\[\](){},$]""", value)
    ):
        return override
    return f"{key}='{value}'"


class _Tee(io.TextIOBase):
    """Holds back what Hydra prints before the task starts; passes everything through from then on."""

    def __init__(self, held: io.StringIO, started: Callable[[], bool]) -> None:
        self.held, self.started, self.stderr = held, started, sys.stderr

    def write(self, text: str) -> int:
        show = self.started() or os.environ.get("HYDRA_FULL_ERROR") == "1"
        return (self.stderr if show else self.held).write(text)

    def flush(self) -> None:
        self.stderr.flush()

    def fileno(self) -> int:
        return self.stderr.fileno()

    def isatty(self) -> bool:
        return self.stderr.isatty()


def _refuse(line: str) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
    print("error:", " ".join(line.split()), file=sys.stderr, flush=True)
    _leave(2)


def _leave(code: int) -> None:
    """Exit at once: threads and process groups of a failed rank must not keep it, and others wait for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and code:
        os._exit(code)
    sys.exit(code)


def _carry_out(config: DictConfig, schema: Any, check: Any, run: Any) -> None:
    begin = time.monotonic()
    try:
        if file := os.environ.get(handover.VARIABLE):
            _check_unfinished(handover.hand_over(config, schema, Path(file)))
            return
        parsed = parse(schema, config)
        if parsed.cluster is not None:
            raise InputError("cluster: launchers/slurm.sh submits; here nothing would")
        directory = Path(parsed.run_dir)
        prepared = _claim_and_check(parsed, directory, check)
        if os.environ.get("NEMO_MINITRON_PREPARE") == "1":
            OmegaConf.save(_resolved(config, prepared), directory / "resolved.yaml")
            print(directory.resolve(), flush=True)
            return
        fields = run(parsed, prepared, directory)
    except InputError as error:
        _refuse(str(error))
    except InterruptedRun as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        _leave(INTERRUPTED)
    except FailedRun as error:
        print(f"error: {error}; {parsed.run_dir} keeps what was finished", file=sys.stderr)
        _leave(1)
    except Exception:
        traceback.print_exc()
        print(f"error: {_failure(parsed.run_dir)}; {parsed.run_dir} keeps what was finished", file=sys.stderr)
        _leave(1)
    else:
        if rank() == 0:
            path = write_result(directory, {**fields, "wall_s": round(time.monotonic() - begin, 2)})
            print(path, flush=True)
        _end_group()


def _failure(directory: str) -> str:
    """What went wrong, where a traceback hides it: of a full disk torch only says that writing failed."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(directory).free
        if free < _NO_SPACE:
            return f"the run failed: no space left on the disk of {directory} ({free / 2**20:.1f} MiB)"
    return "the run failed"


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
    return OmegaConf.create({**plain, "prepared": prepared.to_config()})


def _check_unfinished(parsed: CommonConfig) -> None:
    if (Path(parsed.run_dir) / RESULT).exists() and not parsed.overwrite:
        raise InputError(
            f"run_dir={parsed.run_dir}: already holds a result; choose another or say overwrite=true"
        )


def _claim_and_check(parsed: CommonConfig, directory: Path, check: Callable[[Any], Any]) -> Any:
    _check_unfinished(parsed)
    if rank() == 0 and (directory / LOCK).exists():  # at once, before a long check
        claim(directory)
    prepared = check(parsed)
    if rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        claim(directory)
        (directory / RESULT).unlink(missing_ok=True)
    return prepared


def fresh(path: Path) -> Path:
    """Remove what an unfinished or overwritten run left at `path` (rank 0), and return it."""
    if rank() == 0 and (path.exists() or path.is_symlink()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return path


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def write_result(directory: Path, fields: dict[str, Any]) -> Path:
    """Write RUN/result.json atomically: its presence is what says that a run is finished."""
    path = (directory / RESULT).resolve()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
    return path
