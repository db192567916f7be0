"""Renders the sbatch file of one recipe, or of a sweep over one, for launchers/slurm.py."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = "job"  # RUN/job.yaml


@dataclass(frozen=True)
class Job:
    """What is submitted at once: a recipe with one configuration, or with several, as a job array.

    `runs`: the absolute run directories. `configs`: what RUN/job.yaml will hold, in the same order. `cluster`: of
    `nemo_minitron.config.cluster.ClusterConfig`. `ranks`, `num_nodes`: of the layout. `missing`: keys that have no
    value yet.
    """

    recipe: Path
    runs: list[Path]
    configs: list[dict[str, Any]]
    cluster: dict[str, Any]
    ranks: int
    num_nodes: int
    missing: list[str]

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.recipe.stem

    @property
    def ranks_per_node(self) -> int:
        """Tasks that srun starts on a node."""
        return self.ranks // self.num_nodes

    @property
    def directory(self) -> Path:
        """Where the sbatch file and SLURM's log lie: the run directory, or that of all runs of a sweep."""
        return self.runs[0] if len(self.runs) == 1 else self.runs[0].parent

    @property
    def log(self) -> str:
        """SLURM's log, with its own pattern for the job's id."""
        return str(self.directory / "logs" / ("slurm-%j.log" if len(self.runs) == 1 else "slurm-%A_%a.log"))


def render(job: Job, after: list[str]) -> str:
    """The file for sbatch.

    Args:
        after: job ids that have to end well before.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options(job, after)), "#", *summary(job), ""]
    return "\n".join(lines) + body(job)


def options(job: Job, after: list[str]) -> list[str]:
    """sbatch's options, one a line, in the order in which one reads them."""
    c = job.cluster
    found = [
        f"--job-name={job.name}",
        *(f"--{key}={c[key]}" for key in ("partition", "account", "qos") if c[key]),
        f"--nodes={job.num_nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--gpus-per-node={job.ranks_per_node}" if c["gpus_per_node"] else "",
        f"--cpus-per-task={c['cpus_per_task']}" if c["cpus_per_task"] else "",
        f"--mem={c['mem']}" if c["mem"] else "",
        f"--time={c['time']}" if c["time"] else "",
        # To the ranks, not to this script.
        f"--signal=USR1@{c['signal_s']}",
        "--requeue" if c["requeue"] else "--no-requeue",
        "--open-mode=append",
        f"--chdir={quoted(str(Path.cwd()))}",
        f"--output={quoted(job.log)}",
        f"--array=0-{len(job.runs) - 1}{'%' + str(c['array_parallel']) if c['array_parallel'] else ''}"
        if len(job.runs) > 1
        else "",
        f"--dependency=afterok:{':'.join(after)}" if after else "",
        # A job whose predecessor failed would stay in the queue for ever.
        "--kill-on-invalid-dep=yes" if after else "",
        *c["sbatch_options"],
    ]
    return [option for option in found if option]


def quoted(value: str) -> str:
    """A value in an #SBATCH line, which sbatch splits at spaces."""
    return f'"{value}"' if any(c.isspace() or c in "#\"'" for c in value) else value


def summary(job: Job) -> list[str]:
    """What the job is about, as comments."""
    config = job.configs[0]
    t, distill = config["trainer"], config.get("distill") or {}
    batch = distill.get("global_batch_size") if job.name in ("distill", "correct_teacher") else None
    steps = distill.get("max_steps") if batch else t["max_steps"]
    sources = [f"{key}={config[key]}" for key in ("source", "student", "teacher") if config.get(key)]
    layout = " x ".join(
        f"{name} {t[f'{name}{where}_parallel_size']}"
        for name, where in (("tensor", "_model"), ("pipeline", "_model"), ("context", ""), ("data", ""))
    )
    lines = [
        f"{job.name}: {' '.join(sources)}".rstrip(": "),
        f"{job.ranks} ranks: {layout}, {t['precision']}",
        f"batches of {batch or t['global_batch_size']} sequences of {config['data']['seq_length']} tokens"
        + (f", {steps} steps" if steps else ""),
    ]
    if len(job.runs) > 1:
        lines.append(f"a sweep over {len(job.runs)} configurations")
    return [f"# {line}" for line in lines]


def body(job: Job) -> str:
    """The script itself."""
    requeue = job.cluster["requeue"]
    return BODY.format(
        runs="\n".join(f"    {shlex.quote(str(run))}" for run in job.runs),
        environment="\n".join(
            f"export {name}={shlex.quote(str(value))}" for name, value in job.cluster["env"].items()
        ),
        setup="\n".join(job.cluster["setup"]),
        root=shlex.quote(str(ROOT)),
        recipe=shlex.quote(str(job.recipe.resolve())),
        python=shlex.quote(python_of(job.cluster)),
        container=" ".join(map(shlex.quote, container(job))),
        srun=" ".join(map(shlex.quote, job.cluster["srun_options"])),
        configuration=CONFIGURATION,
        ranks=job.ranks,
        goes_back=", goes back into the queue" if requeue else "; submitted again, it goes on",
        requeue='scontrol requeue "$SLURM_JOB_ID"' if requeue else ":",
    )


def python_of(cluster: dict[str, Any]) -> str:
    """The interpreter of the ranks."""
    return cluster["python"] or ("python" if cluster["container_image"] else sys.executable)


def container(job: Job) -> list[str]:
    """srun's options for pyxis; none without an image."""
    image = job.cluster["container_image"]
    if not image:
        return []
    if image.endswith(".sqsh"):
        image = str(Path(image).expanduser().resolve())
    elsewhere = [run for run in job.runs if job.directory not in (run, *run.parents)]
    own = dict.fromkeys([ROOT, Path.cwd(), job.directory, *elsewhere])
    mounts = [f"{path}:{path}" for path in own] + job.cluster["container_mounts"]
    return [
        f"--container-image={image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={Path.cwd()}",
    ]


BODY = r"""
set -uo pipefail
runs=(
{runs}
)
run=${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}
attempt=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}

export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-}}; [[ $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
export NEMO_MINITRON_NPROC={ranks}
{environment}
{setup}

container=({container})
recipe=({python} {recipe} --config-path "$run")
where="hydra.run.dir='${{run//\'/\\\'}}'"

# Once, in one process: conversion and indices. A job that was requeued finds them done.
code=0
if [[ ${{SLURM_RESTART_COUNT:-0}} == 0 || ! -e $run/resolved.yaml ]]; then
    NEMO_MINITRON_PREPARE=1 srun --nodes=1 --ntasks=1 "${{container[@]}}" {srun} \
        "${{recipe[@]}}" --config-name {configuration} "$where" || code=$?
fi

# One task a rank, all of them under the configuration that is now resolved.
if [[ $code == 0 ]]; then
    srun --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --kill-on-bad-exit=1 "${{container[@]}}" {srun} \
        {python} {root}/launchers/slurm_rank.py "$run" "$run/logs/failed.$attempt" \
        "${{recipe[@]}}" --config-name resolved "$where" || code=$?
fi

# srun tells the largest exit code; the first rank that failed left its own.
rank=
[[ $code == 0 || ! -e $run/logs/failed.$attempt ]] || read -r rank code <"$run/logs/failed.$attempt"
case $code in
0) ;;
75 | 143)
    # 75: a checkpoint was saved when SLURM said that the end is near. 143: preempted before there was anything to save.
    echo "job $SLURM_JOB_ID: interrupted{goes_back}" >&2
    {requeue}
    ;;
*)
    echo "job $SLURM_JOB_ID: ${{rank:+rank $rank }}failed with exit code $code; logs: $run/logs" >&2
    if [[ $rank && $rank != 0 ]]; then tail -n 30 "$run/logs/rank$rank.stderr.log" >&2; fi
    if [[ $code == 138 ]]; then echo "the time limit came before training: give it more cluster.time" >&2; fi
    ;;
esac
exit "$code"
"""
