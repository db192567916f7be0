"""What a SLURM site gives to a job, as `conf/cluster/*.yaml` says it, and how a layout fits into it."""

import re
from dataclasses import dataclass, field

from nemo_minitron.config.ranges import Count, Positive
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.errors import InputError
from nemo_minitron.files import user_path

# sbatch's --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on.
_TIME = re.compile(r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}")


@dataclass
class ClusterConfig:
    """The options of sbatch and srun that differ from site to site; null: the site's own default.

    `partition`, `account` and `qos`: SLURM's. `time`: the limit, as "04:00:00". `mem`: memory of a node, as "64G".

    `gpus_per_node`: how many a node has; 0: a node has none, and ranks run over gloo. `cpus_per_task`: cores a rank.
    `signal_s`: seconds before the time limit at which a training run saves a checkpoint. `requeue`: whether the job
    then puts itself back into the queue. `array_parallel`: how many jobs of a sweep may run at a time.

    `container_image`: for pyxis (a .sqsh file, or what `enroot import` takes); null: ranks run on the node itself.
    `container_mounts`: further ones, SRC:DST[:ro]; the repository, the run directory and the working directory are
    always mounted. `python`: the interpreter; null: the one that submits, or `python` in a container.

    `sbatch_options` and `srun_options`: whatever else the site wants, such as --reservation=NAME. `setup`: shell lines
    before the ranks start, such as `module load cuda`. `env`: variables of every rank.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpus_per_node: Count = 8
    cpus_per_task: Positive | None = None
    mem: str | None = None
    signal_s: Positive = 300
    requeue: bool = True
    array_parallel: Positive | None = None
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    python: str | None = None
    sbatch_options: list[str] = field(default_factory=list)
    srun_options: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)


def check_cluster(c: ClusterConfig, t: TrainerConfig) -> None:
    """Refuse a job that SLURM could not start, or that would not be what the layout asks for.

    Raises:
        InputError: names the key, its value and what would be legal.
    """
    _check_nodes(c, t)
    _check_time(c)
    for key, text in _lines(c):
        if "\n" in text:
            raise InputError(f"cluster.{key}={text!r}: must be one line")
    for option in (*c.sbatch_options, *c.srun_options):
        if not option.startswith("-"):
            raise InputError(
                f"cluster.sbatch_options, cluster.srun_options: {option!r} is no option, such as --x=y"
            )
    if unnamed := [name for name in c.env if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
        raise InputError(f"cluster.env: {unnamed[0]!r} is no name of a variable")
    _check_container(c)


def _check_nodes(c: ClusterConfig, t: TrainerConfig) -> None:
    per_node = t.ranks // t.num_nodes
    if 0 < c.gpus_per_node < per_node:
        needed = -(-t.ranks // c.gpus_per_node)
        raise InputError(
            f"trainer.num_nodes={t.num_nodes}: puts {per_node} ranks on a node of {c.gpus_per_node} GPUs "
            f"(cluster.gpus_per_node); the layout's {t.ranks} ranks need at least {needed} nodes"
        )


def _check_time(c: ClusterConfig) -> None:
    if c.time is None:
        return
    if not _TIME.fullmatch(c.time):
        raise InputError(f"cluster.time={c.time}: must be as sbatch takes it, such as 04:00:00 or 2-00:00:00")
    if seconds(c.time) <= c.signal_s:
        raise InputError(
            f"cluster.time={c.time}: must be longer than cluster.signal_s={c.signal_s} s, when ranks are told to end"
        )


def seconds(time: str) -> int:
    """sbatch's --time in seconds: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, left = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, left = parts
    else:
        hours, (minutes, left) = 0, (*parts, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + left


def _lines(c: ClusterConfig) -> list[tuple[str, str]]:
    named = [(key, value) for key, value in vars(c).items() if isinstance(value, str)]
    listed = [
        (key, text)
        for key in ("container_mounts", "sbatch_options", "srun_options")
        for text in getattr(c, key)
    ]
    return named + listed + [("env", value) for value in c.env.values()]


def _check_container(c: ClusterConfig) -> None:
    image = c.container_image
    if image is None:
        if c.container_mounts:
            raise InputError(
                "cluster.container_mounts: there is no container; name a cluster.container_image"
            )
        return
    # What enroot fetches has no such beginning or ending: nvcr.io#nvidia/nemo:25.07
    is_file = image.endswith(".sqsh") or image.startswith(("/", "./", "../", "~"))
    if is_file and not user_path(image).is_file():
        raise InputError(
            f"cluster.container_image={image}: no such file; make one with enroot import, or name a registry's"
        )
