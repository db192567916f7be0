#!/usr/bin/env python3
"""A SLURM cluster of one node on this machine's loopback, for tests and for trying launchers/slurm.sh.

    sudo launchers/slurm_on_loopback.py start DIR     # prints what to put into the environment: eval "$(... start DIR)"
    sudo launchers/slurm_on_loopback.py stop DIR

Debian's packages are unpacked under DIR, not installed: the machine, and a SLURM that it may have, stay as they are.
Nothing listens on other addresses than 127.0.0.1. Needs root, apt-get and a few seconds.

The node has two cores, whatever the machine has. Partitions: `main`, from which jobs of `urgent` drive others away,
after GraceTime, as PreemptMode=REQUEUE does it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "libmunge2",
    "libhwloc15",
    "liblua5.1-0",
)
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldAddr=127.0.0.1
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
# A job that was requeued waits as long as its credential lives; the usual 120 s would be most of a test.
AuthInfo=socket={directory}/munge.socket,cred_expire=10
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
PluginDir={plugins}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


class UnavailableError(Exception):
    """SLURM cannot run here; the message says why."""


def start(directory: Path) -> dict[str, str]:
    """Unpacks, configures and starts the three daemons.

    Returns:
        what the environment of sbatch and the other commands needs.

    Raises:
        UnavailableError: no root, no packages, or a daemon that does not come up.
    """
    if os.geteuid() != 0:
        raise UnavailableError("only root can start slurmd")
    if len(str(directory)) > 80:
        raise UnavailableError(f"{directory}: too long a path for munge's socket")
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    unpack(directory)
    library = next((directory / "root/usr/lib").glob("*/slurm-wlm")).resolve()
    configure(directory, library)
    environment = {
        "PATH": f"{directory}/root/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{library}:{library.parent}",
        "SLURM_CONF": f"{directory}/slurm.conf",
    }
    try:
        for command in commands(directory):
            run_daemon(command, {**os.environ, **environment}, directory)
        wait_until_idle(environment)
    except UnavailableError:
        stop(directory)
        raise
    return environment


def unpack(directory: Path) -> None:
    """Downloads the packages and unpacks them below DIR/root."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not here")
    archives = directory / "archives"
    archives.mkdir()
    download = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *PACKAGES]
    done = subprocess.run(download, cwd=archives, capture_output=True, text=True, timeout=300)
    if done.returncode:  # the lists may be old, or missing in a fresh image
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, timeout=300)
        done = subprocess.run(download, cwd=archives, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise UnavailableError(f"apt-get cannot download SLURM: {(done.stderr.split(chr(10)) or ['?'])[0]}")
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, directory / "root"], check=True, timeout=60)


def configure(directory: Path, plugins: Path) -> None:
    """Writes slurm.conf and a key for munge."""
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    with socket.socket() as one, socket.socket() as other:
        for listener in (one, other):
            listener.bind(("127.0.0.1", 0))
        controller_port, node_port = one.getsockname()[1], other.getsockname()[1]
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        directory=directory,
        plugins=plugins,
        controller_port=controller_port,
        node_port=node_port,
    )
    (directory / "slurm.conf").write_text(text)


def commands(directory: Path) -> list[list[str]]:
    """The daemons' command lines, in the order in which they start."""
    sbin = directory / "root/usr/sbin"
    munged = [
        f"{sbin}/munged",
        "--force",
        f"--socket={directory}/munge.socket",
        f"--key-file={directory}/munge.key",
    ]
    munged += [f"--pid-file={directory}/munged.pid", f"--log-file={directory}/munged.log"]
    munged += [f"--seed-file={directory}/munge.seed"]
    configuration = ["-f", f"{directory}/slurm.conf"]
    stepd = ["-d", f"{sbin}/slurmstepd-wlm"]
    return [
        munged,
        [f"{sbin}/slurmctld-wlm", *configuration],
        [f"{sbin}/slurmd-wlm", *configuration, *stepd],
    ]


def run_daemon(command: list[str], environment: dict[str, str], directory: Path) -> None:
    """Starts one daemon; it goes into the background by itself, with none of this process's files."""
    with open(directory / "start.log", "a") as log:
        code = subprocess.call(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60
        )
    if code:
        last = (directory / "start.log").read_text().strip().splitlines()[-1:]
        raise UnavailableError(f"{Path(command[0]).name} ended with exit code {code}: {' '.join(last)}")


def wait_until_idle(environment: dict[str, str], seconds: float = 60) -> None:
    """Until the node takes jobs."""
    give_up, state = time.monotonic() + seconds, ""
    while time.monotonic() < give_up:
        asked = subprocess.run(
            ["sinfo", "-h", "-p", "main", "-o", "%T"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        state = (asked.stdout or asked.stderr).strip()
        if state == "idle":
            return
        time.sleep(0.2)
    raise UnavailableError(f"the node is {state!r} after {seconds:.0f} s")


def stop(directory: Path) -> None:
    """Ends the daemons and what their jobs left; the directory stays."""
    for name in reversed(DAEMONS):
        with contextlib.suppress(OSError, ValueError):
            pid = int((directory / f"{name}.pid").read_text())
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)


def main() -> int:
    """The command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    directory = Path(sys.argv[2]).resolve()
    if sys.argv[1] == "stop":
        stop(directory)
        return 0
    try:
        environment = start(directory)
    except UnavailableError as error:
        print(f"launchers/slurm_on_loopback.py: {error}", file=sys.stderr)
        return 1
    for name, value in environment.items():
        print(f"export {name}='{value}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
