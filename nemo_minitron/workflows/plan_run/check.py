"""What can be said of a plan before anything is measured: every step is composed, and what does not fit is refused."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from nemo_minitron.config.pipeline import StepConfig
from nemo_minitron.config.plan import HERE, PlanConfig, PlanRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.files import user_path
from nemo_minitron.planning.layouts import Option, options
from nemo_minitron.planning.machines import GIB, Cluster, gpu, this_machine
from nemo_minitron.planning.memory import (
    Layout,
    Memory,
    Training,
    forward_memory,
    streamed_memory,
    training_memory,
)
from nemo_minitron.workflows.one_process import OneProcess
from nemo_minitron.workflows.pipeline.check import compose, shared_overrides
from nemo_minitron.workflows.pipeline.steps import Step, steps_of
from nemo_minitron.workflows.plan_run.work import Models, Work, left_behind, work_of

# What is typed for the plan itself.
_OWN = ("plan", "pipeline", "run_dir", "overwrite", "seed")
# Of these the recipe that is planned has its own use.
_OF_STEPS = ("data", "trainer", "eval", "seed", "source")


@dataclass(frozen=True)
class Planned:
    """A step, what it computes, and how it can be laid out.

    Attributes:
        layout: that of its configuration; memory: what a rank needs under it.
        options: the layouts of all devices that fit, the fastest first; of steps that train.
    """

    step: Step
    work: Work
    layout: Layout
    memory: Memory
    options: list[Option]


@dataclass(frozen=True)
class Prepared(OneProcess):
    """The steps, and what they may take."""

    steps: list[Planned]
    cluster: Cluster


def check(r: PlanRecipe) -> Prepared:
    """Compose every step, and see what it needs.

    Raises:
        InputError: names the step and what is wrong with it; a training that fits under no layout.
    """
    cluster = cluster_of(r.plan)
    steps = _steps(r)
    with ThreadPoolExecutor(max_workers=2) as pool:
        composed = list(pool.map(lambda step: _composed(step, r.plan), steps))
    models, planned = Models(), []
    for step, config in zip(steps, composed, strict=True):
        where = "" if r.plan.recipe else f"pipeline.steps.{step.name}: "
        try:
            work = work_of(step.recipe, config, models)
            left_behind(work, config, models, step.directory)
            planned.append(_planned(step, work, config, cluster))
        except InputError as error:
            raise InputError(f"{where}{error}") from None
    return Prepared(planned, cluster)


def cluster_of(p: PlanConfig) -> Cluster:
    """What `plan` says there is.

    Raises:
        InputError: more than one process of this machine, or a peak for it.
    """
    if p.gpu != HERE:
        device = gpu(p.gpu, p.memory_gib, p.tflops)
        per_node = p.gpus_per_node or 8
        return Cluster(
            device, p.nodes, per_node, p.efficiency, p.network_gb_s * 1e9, price_per_hour=p.price_per_hour
        )
    if p.nodes * (p.gpus_per_node or 1) != 1 or p.tflops is not None:
        raise InputError(
            f"plan.gpu={HERE}: is one process, whose speed is measured; plan.nodes and plan.gpus_per_node must be 1, "
            "plan.tflops null"
        )
    return Cluster(this_machine(p.memory_gib), price_per_hour=p.price_per_hour)


def _typed() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].split(".")[0]


def _steps(r: PlanRecipe) -> list[Step]:
    """Those of the pipeline, or the one run.

    Raises:
        InputError: settings of a run beside a pipeline, or the other way round; what `steps_of` refuses.
    """
    run_dir, source = Path(r.run_dir).absolute(), str(user_path(r.source).absolute())
    if r.plan.recipe is None:
        for text in _typed():
            if (key := _key(text)) not in (*_OWN, *_OF_STEPS, "conf"):
                raise InputError(
                    f"{text}: belongs to one run; name it with plan.recipe, or say pipeline.steps.STEP.set.{key}..."
                )
        return steps_of(r.pipeline.steps, source, run_dir, shared_overrides())
    if typed := [text for text in _typed() if _key(text) == "pipeline"]:
        raise InputError(
            f"{typed[0]}: is not read beside plan.recipe={r.plan.recipe}; leave one of the two out"
        )
    given = [text for text in _typed() if _key(text) not in _OWN]
    one = steps_of({"run": StepConfig(r.plan.recipe)}, source, run_dir, given)[0]
    return [dataclasses.replace(one, name=r.plan.recipe)]


def _composed(step: Step, p: PlanConfig) -> dict[str, Any]:
    """A step's configuration; what is still to be given holds its own name in angle brackets."""
    try:
        return dict(compose(step, complete=False)["config"])
    except InputError as error:
        if p.recipe is None:
            raise
        raise InputError(str(error).partition(": ")[2]) from None


def _planned(step: Step, work: Work, config: dict[str, Any], cluster: Cluster) -> Planned:
    """Raises: InputError: a training that fits under no layout."""
    t, here = config["trainer"], cluster.device.name == HERE
    layout = Layout(
        t["tensor_model_parallel_size"],
        t["pipeline_model_parallel_size"],
        t["data_parallel_size"],
        t["sequence_parallel"],
        t["recompute_granularity"],
        t["micro_batch_size"],
    )
    if work.training is None:
        models = list(dict.fromkeys(each.model for each in work.passes))
        tokens = work.micro_batch * work.length
        needs = streamed_memory if work.stream else forward_memory
        memory = needs(models, layout, tokens, work.precision) if models else Memory()
        return Planned(step, work, layout, memory, [])
    memory = training_memory(work.training, layout, cuda=not here)
    if here:
        _check_room_here(work.training, layout, cluster)
        return Planned(step, work, layout, memory, [])
    return Planned(step, work, layout, memory, options(work.training, cluster))


def _check_room_here(t: Training, layout: Layout, cluster: Cluster) -> None:
    """Refuse a training for which this machine has too little memory, whatever the microbatch.

    Raises:
        InputError: says how much the least of them would need.
    """
    least = training_memory(t, dataclasses.replace(layout, micro_batch=1, recompute="full"), cuda=False)
    if least.total > cluster.device.memory:
        raise InputError(
            f"nothing fits: needs at least {least.total / GIB:.1f} GiB here (micro_batch_size=1, "
            f"recompute_granularity=full), and there are {cluster.device.memory / GIB:.1f}"
        )
