"""The parallel layout that a run asks for, and what of it can be refused before a model is known."""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from nemo_minitron.config.ranges import Choice, Count, Positive
from nemo_minitron.environment import COMPOSE, NPROC
from nemo_minitron.errors import InputError


@dataclass
class TrainerConfig:
    """The parallel layout (MegatronStrategy's argument names), precision and batches.

    `tensor_model_parallel_size`, `pipeline_model_parallel_size`, `context_parallel_size` and `data_parallel_size`
    multiply to the number of ranks, on `num_nodes` machines. `sequence_parallel`: tensor-parallel ranks share what lies
    between attention and MLP along the sequence. `num_layers_in_first_pipeline_stage`,
    `num_layers_in_last_pipeline_stage`: uneven stages; null: even ones. `micro_batch_size`: sequences that a
    data-parallel rank takes at once; `global_batch_size`: those of a step over all of them.

    Of pretraining alone: `max_steps`; `val_check_interval`, steps from one validation and checkpoint to the next (0:
    only at the end); `limit_val_batches` of a validation (0: none). `log_every_n_steps`: how often a training prints a
    line.

    `recompute_granularity`: activations that the backward pass recomputes instead of keeping them: "selective",
    those of attention, or "full", those of whole layers (Megatron-core's names); null: none.
    `checkpoint_dtype`: of the weights in the checkpoint that a recipe ends with; null: as they lie in the model that it
    began with. What is computed in, and in what a training keeps its state, is `precision`'s matter.
    """

    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    context_parallel_size: Positive = 1
    data_parallel_size: Positive = 1
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: Positive | None = None
    num_layers_in_last_pipeline_stage: Positive | None = None
    num_nodes: Positive = 1
    precision: Annotated[str, Choice("32", "bf16-mixed")] = "32"
    recompute_granularity: Annotated[str, Choice("selective", "full")] | None = None
    checkpoint_dtype: Annotated[str, Choice("float32", "float16", "bfloat16")] | None = None
    micro_batch_size: Positive = 8
    global_batch_size: Positive = 8
    max_steps: Count = 0
    val_check_interval: Count = 0
    limit_val_batches: Count = 0
    log_every_n_steps: Positive = 10

    @property
    def ranks(self) -> int:
        """Processes that the layout needs."""
        model = (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )
        return model * self.data_parallel_size


def check_stages(t: TrainerConfig, num_layers: int, key: str) -> None:
    """Refuse a number of layers that cannot be laid out over the pipeline stages.

    Stages share the layers evenly, but for the first and the last where the layout gives them a number of their own
    (megatron-core@0.13.1 transformer/transformer_block.py, get_num_layers_to_build).

    Args:
        t: the layout.
        num_layers: of the whole model.
        key: what to call them.

    Raises:
        InputError: names the key and what would be legal.
    """
    pp = t.pipeline_model_parallel_size
    names = [f"num_layers_in_{place}_pipeline_stage" for place in ("first", "last")]
    own = {name: getattr(t, name) for name in names if getattr(t, name) is not None}
    stages, layers = pp - len(own), num_layers - sum(own.values())
    given = ", ".join(f"trainer.{name}={value}" for name, value in own.items())
    if own and (pp == 1 or min(own.values()) < 1):
        raise InputError(
            f"{given}: must be at least 1, and needs trainer.pipeline_model_parallel_size above 1"
        )
    if own and (layers % stages or layers < stages if stages else layers):
        raise InputError(
            f"{given}: {layers} of {key} {num_layers} are left for the {stages} other stages, which must get equally "
            "many, at least one each"
        )
    if not own and num_layers % pp:
        raise InputError(
            f"trainer.pipeline_model_parallel_size={pp}: does not divide {key} {num_layers}; uneven stages need "
            f"trainer.{names[0]} or trainer.{names[1]}"
        )


def check_tensor_ranks(key: str, ranks: int, sizes: Mapping[str, int]) -> None:
    """Refuse a tensor-parallel size that does not divide what its ranks share.

    Megatron-core 0.13.1 cuts query groups and the MLP into equal parts, and copies neither (transformer/attention.py);
    the vocabulary is filled up (`padding`).

    Args:
        key: what the configuration calls the size.
        ranks: the size.
        sizes: what it must divide, each with the name that the message gives it.

    Raises:
        InputError: names the key, the size that it does not divide and the values that divide all.
    """
    for name, size in sizes.items():
        if size % ranks:
            raise InputError(
                f"{key}={ranks}: does not divide {name} {size}; legal here: {common_divisors(sizes.values())}"
            )


def common_divisors(sizes: Iterable[int]) -> str:
    """The numbers that divide all sizes, as a message lists them."""
    common = math.gcd(*sizes)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)


def check_trainer(t: TrainerConfig, *, is_pipeline: bool = False) -> None:
    """Refuse an impossible layout or batch, a feature that is not here, or another number of ranks than were started.

    Args:
        is_pipeline: the layout is that of steps, each of which starts its own ranks.

    Raises:
        InputError: names the key and what would be legal.
    """
    if t.global_batch_size % (t.micro_batch_size * t.data_parallel_size):
        raise InputError(
            f"trainer.global_batch_size={t.global_batch_size}: must be a multiple of micro_batch_size "
            f"{t.micro_batch_size} x data_parallel_size {t.data_parallel_size}"
        )
    if t.sequence_parallel and t.tensor_model_parallel_size == 1:
        raise InputError("trainer.sequence_parallel=true: needs trainer.tensor_model_parallel_size above 1")
    if t.context_parallel_size > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise InputError(
            f"trainer.context_parallel_size={t.context_parallel_size}: needs Transformer Engine, which is not here"
        )
    _check_ranks(t, is_pipeline)


def _check_ranks(t: TrainerConfig, is_pipeline: bool) -> None:
    world = int(os.environ.get(NPROC) or os.environ.get("WORLD_SIZE") or 1)
    if is_pipeline and world > 1 and "RANK" in os.environ:
        raise InputError(
            f"{world} ranks were started, but a pipeline is one process, whose steps start their own"
        )
    if is_pipeline or os.environ.get(COMPOSE):  # a launcher will start as many as the layout asks for
        world = t.ranks
    if world != t.ranks:
        raise InputError(
            f"{world} rank{'s were' if world > 1 else ' was'} started, but the layout needs {t.ranks}: tensor "
            f"{t.tensor_model_parallel_size} x pipeline {t.pipeline_model_parallel_size} x context "
            f"{t.context_parallel_size} x data {t.data_parallel_size} (trainer.*_parallel_size)"
        )
    if t.ranks % t.num_nodes:
        raise InputError(f"trainer.num_nodes={t.num_nodes}: does not divide the layout's ranks, {t.ranks}")
