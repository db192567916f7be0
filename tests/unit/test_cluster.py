"""What a SLURM site gives: which settings and layouts are refused, and what the job says of them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launchers import sbatch
from nemo_minitron.config.cluster import ClusterConfig, check_cluster, seconds
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.errors import InputError

NODES = TrainerConfig(tensor_model_parallel_size=8, data_parallel_size=4, num_nodes=4)
DEFAULTS = vars(ClusterConfig())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gpus_per_node": 4}, ["trainer.num_nodes=4", "8 ranks on a node of 4 GPUs", "at least 8 nodes"]),
        ({"time": "four hours"}, ["cluster.time=four hours", "04:00:00"]),
        ({"time": "5", "signal_s": 300}, ["cluster.time=5", "cluster.signal_s=300"]),
        ({"partition": "a\n#SBATCH --nodes=9"}, ["cluster.partition", "one line"]),
        ({"sbatch_options": ["reservation"]}, ["'reservation' is no option"]),
        ({"env": {"A B": "1"}}, ["cluster.env", "'A B'"]),
        ({"container_mounts": ["/a:/a"]}, ["cluster.container_mounts", "cluster.container_image"]),
        ({"container_image": "/nowhere/nemo.sqsh"}, ["/nowhere/nemo.sqsh", "no such file"]),
        ({"container_image": "nemo.sqsh"}, ["cluster.container_image=nemo.sqsh", "no such file"]),
    ],
)
def test_refused(given: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check_cluster(ClusterConfig(**given), NODES)
    assert len(str(caught.value).splitlines()) == 1
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("04:00:00", 14400),
        ("2-00", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_seconds(time: str, expected: int) -> None:
    """The formats of sbatch's manual page."""
    assert seconds(time) == expected
    check_cluster(ClusterConfig(time=time), NODES)


def job(*, runs: int = 1, **cluster: Any) -> sbatch.Job:
    trainer = vars(NODES)
    config = {"trainer": trainer, "data": {"seq_length": 64}, "source": "a", "distill": None}
    directories = [Path("/runs") / str(number) for number in range(runs)]
    return sbatch.Job(
        Path("prune.py"), directories, [config] * runs, {**DEFAULTS, **cluster}, 32, 4, missing=[]
    )


def options_of(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def test_what_the_site_says_becomes_options() -> None:
    script = sbatch.render(
        job(partition="p", account="a", qos="q", time="1:00:00", cpus_per_task=6, mem="0", env={"X": "a b"}),
        [],
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
    found = options_of(script)
    for expected in (
        "--partition=p",
        "--account=a",
        "--qos=q",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=6",
        "--mem=0",
        "--time=1:00:00",
        "--requeue",
    ):
        assert expected in found
    assert "export X='a b'" in script
    assert not any("container" in option for option in found)
    # all options are read: sbatch stops at the first command
    assert script.index("#SBATCH") < script.rindex("#SBATCH") < script.index("set -uo pipefail")


def test_without_gpus_and_requeueing() -> None:
    script = sbatch.render(job(gpus_per_node=0, requeue=False, sbatch_options=["--exclusive"]), ["7", "8"])
    found = options_of(script)
    assert not any(option.startswith("--gpus") for option in found)
    assert {"--no-requeue", "--exclusive", "--dependency=afterok:7:8", "--kill-on-invalid-dep=yes"} <= set(
        found
    )
    assert "scontrol requeue" not in script


def test_a_container(tmp_path: Path) -> None:
    """pyxis' options are srun's: both steps run in the image, with the paths of the host."""
    image = tmp_path / "nemo.sqsh"
    script = sbatch.render(job(container_image=str(image), container_mounts=["/data:/data:ro"]), [])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
    (container,) = re.findall(r"^container=\((.*)\)$", script, re.MULTILINE)
    assert f"--container-image={image}" in container
    mounts = re.search(r"--container-mounts=(\S+)", container)
    assert mounts
    assert {f"{sbatch.ROOT}:{sbatch.ROOT}", "/runs/0:/runs/0", "/data:/data:ro"} <= set(mounts[1].split(","))
    assert script.count('"${container[@]}"') == script.count("srun --") == 2
    assert "recipe=(python " in script
    assert "--container-image=nvcr.io#nvidia/nemo:25.07" in sbatch.render(
        job(container_image="nvcr.io#nvidia/nemo:25.07"), []
    )


def test_a_sweep_is_an_array() -> None:
    swept = job(runs=3, array_parallel=2)
    assert "--array=0-2%2" in options_of(sbatch.render(swept, []))
    assert swept.directory == Path("/runs")
    assert "--output=/runs/logs/slurm-%A_%a.log" in options_of(sbatch.render(swept, []))
