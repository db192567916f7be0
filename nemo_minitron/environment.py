"""What launchers and ranks tell each other: names in the environment, exit codes, this process's rank and memory.

Only the standard library is imported: launchers/ use it too.
"""

import os

# Set by launchers. COMPOSE: a file to write the composed configuration to, and nothing else is done. PREPARE: check and
# prepare, write RUN/resolved.yaml, and start no rank. CHAIN: a file to which a pipeline writes the command lines of the
# steps that it lacks, and runs none. NPROC: how many ranks there will be. LAUNCHED_BY: the launcher's process, with
# which a recipe ends.
COMPOSE = "NEMO_MINITRON_COMPOSE"
CHAIN = "NEMO_MINITRON_CHAIN"
PREPARE = "NEMO_MINITRON_PREPARE"
NPROC = "NEMO_MINITRON_NPROC"
LAUNCHED_BY = "NEMO_MINITRON_LAUNCHED_BY"
# Set by users. GRACE_S: seconds that a launcher gives ranks to end. STOPPED_S: seconds that a rank may be
# stopped. PYTHON: the interpreter of launchers/*.sh.
GRACE_S = "NEMO_MINITRON_GRACE_S"
STOPPED_S = "NEMO_MINITRON_STOPPED_S"
PYTHON = "NEMO_MINITRON_PYTHON"
VERBOSE = "NEMO_MINITRON_VERBOSE"

RESULT = "result.json"  # in a run directory: its presence says that the run is finished

# Exit codes beside 0 (done) and 1 (failed while running).
BAD_INPUT = 2
INTERRUPTED = 75  # a checkpoint was saved: EX_TEMPFAIL of sysexits.h
INTERRUPTED_BY_USER = 130  # Ctrl-C


def rank() -> int:
    """This process's rank as the launcher set it, 0 where there is none."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def with_package(**more: str) -> dict[str, str]:
    """This environment for a child process, which finds the package where this one did."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def verbose() -> bool:
    """Whether NEMO_MINITRON_VERBOSE=1 asks for all that libraries say."""
    return os.environ.get(VERBOSE) == "1"


def rss_gib() -> float:
    """Resident memory of this process now, in GiB; 0.0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    import resource  # only runs ask, and importing this module is to import nothing

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
