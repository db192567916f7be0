"""The schemas of the configuration, and the only place where it is validated.

Hydra composes plain YAML; `parse` merges it into these dataclasses, so that an unknown key or a wrong type is refused
with one line. What needs the model's sizes (targets, layouts) is checked in `pruning.plan.check_target`.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.errors import InputError

SchemaT = TypeVar("SchemaT")

PRECISIONS = ("32", "bf16-mixed")


@dataclass
class TrainerConfig:
    """The parallel layout (MegatronStrategy's argument names), precision and batches."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    num_nodes: int = 1
    precision: str = "32"
    micro_batch_size: int = 8
    global_batch_size: int = 8
    max_steps: int = 0
    val_check_interval: int = 0
    limit_val_batches: int = 0
    log_every_n_steps: int = 10

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


@dataclass
class OptimConfig:
    """Megatron-core's Adam under warm-up and cosine decay from `lr` to `min_lr`; `warmup_steps` are optimizer steps."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False


@dataclass
class DataConfig:
    """A corpus (`stdlib`, `files`, `hf`), its tokenizer, and how it is packed.

    `tokenizer`: a Hugging Face directory or id; null takes the checkpoint's or, in pretraining, trains a BPE of
    `vocab_size` on the train split. The other keys are those of `data.corpora.load_corpus`.
    """

    name: str = "stdlib"
    seq_length: int = 512
    tokenizer: str | None = None
    vocab_size: int = 1024
    cache_dir: str | None = None
    seed: int = 1234
    train: Any = None
    valid: Any = None
    text_key: str | None = None
    valid_fraction: float | None = None
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str | None = None
    valid_split: str | None = None


@dataclass
class ModelConfig:
    """The architecture that `recipes/pretrain.py` trains from scratch: Llama, in Megatron-core's names."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    init_method_std: float = 0.02


@dataclass
class PruneConfig:
    """What to keep and how to choose it. A size is an integer, a fraction of the source ("3/4"), or null: left alone.

    Layers: `num_layers` lets `layer_metric` choose, `contiguous` as one block of neighbours, never the first
    `protect_first` and the last `protect_last`; or `keep_layers` or `drop_layers` lists them, 0-based;
    `drop_layers=late` is the block right before the last layer. `layer_metric`: "block_influence" or "angular_distance"
    (one pass over the calibration samples for all layers), "lm_loss" (the loss with each layer or block left out, about
    half a pass for each), "task" (the accuracy lost on the questions in `task_file`, likewise).

    `task_file`: a JSONL of multiple-choice questions (`evaluation.multiple_choice.load_task`); the accuracy before and
    after is measured too. `task_normalize`: compare choices by log-probability a token, not by the sum. `scores`: a
    scores.safetensors to use instead of scoring. `iterations`: in how many steps to score and prune. `control_seeds`:
    how many times the same sizes are also pruned at random, for comparison.
    """

    hidden_size: Any = None
    ffn_hidden_size: Any = None
    num_attention_heads: Any = None
    num_query_groups: Any = None
    num_layers: Any = None
    keep_layers: Any = None
    drop_layers: Any = None
    layer_metric: str = "block_influence"
    task_file: str | None = None
    task_normalize: bool = False
    contiguous: bool = False
    protect_first: int = 0
    protect_last: int = 0
    importance: str = "activation"
    seed: int = 0
    batch: str = "l2"
    sequence: str = "mean"
    include_final_norm: bool = True
    head_residual: bool = False
    calibration_samples: int = 128
    scores: str | None = None
    iterations: int = 1
    control_seeds: int = 0


@dataclass
class SearchConfig:
    """Candidates for `recipes/search.py`: the points of `grid` inside `budget`.

    `budget`: upper limits by metric (`parameters`, `non_embedding_parameters`, `flops_per_token`, `memory_bytes`), each
    a number or a fraction of the source's ("1/2"); `slack`: the share of it that a candidate may leave unused.
    `context`
    tokens, `sequences` and `bytes_per_value` are what FLOPs and memory are counted for. `grid`: choices by axis, sizes
    or fractions ("1/1" is the source's size). `method`: `grid` tries the `max_candidates` that use most of the budget,
    `optuna` the `trials` that its sampler asks for.
    """

    budget: Any = None
    slack: float = 0.05
    context: int = 4096
    sequences: int = 1
    bytes_per_value: int = 2
    grid: Any = None
    method: str = "grid"
    max_candidates: int = 20
    trials: int = 20


@dataclass
class EvalConfig:
    """`samples`: packed held-out sequences for the LM loss; null: one whole pass over the valid split."""

    samples: int | None = 64


@dataclass
class CommonConfig:
    """What every recipe has. Groups that a recipe does not use are composed all the same and stay untouched.

    `prepared` is the launcher's: what it checked, converted and indexed once, before the ranks started.
    """

    run_dir: str = MISSING
    overwrite: bool = False
    seed: int = 1234
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: Any = None
    prune: Any = None
    distill: Any = None
    align: Any = None
    search: Any = None
    optim: Any = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    source: Any = None
    student: Any = None
    teacher: Any = None
    prepared: Any = None


@dataclass
class PretrainRecipe(CommonConfig):
    """`recipes/pretrain.py`. `export_dir`: where the trained model is also written in Hugging Face format."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export_dir: str | None = None


@dataclass
class PruneRecipe(CommonConfig):
    """`recipes/prune.py`. `source`: a Hugging Face directory, a NeMo 2 directory, or a run directory that holds one."""

    source: str = MISSING
    prune: PruneConfig = field(default_factory=PruneConfig)


@dataclass
class SearchRecipe(PruneRecipe):
    """`recipes/search.py`. `prune`: how units and layers are chosen, and sizes of axes that the grid leaves open."""

    search: SearchConfig = field(default_factory=SearchConfig)


def parse(schema: type[SchemaT], config: DictConfig) -> SchemaT:
    """Merge a composed configuration into a schema and check it.

    Raises:
        InputError: an unknown key, a missing or wrongly typed value, an impossible layout or batch.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), _without_nulls(config))
        result: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise InputError(f"{key}: {reason}" if key and key not in reason else reason) from None
    _check_trainer(result.trainer)
    _check_ranges(result)
    return result


def _without_nulls(config: DictConfig) -> DictConfig:
    """A group that was not chosen composes to null; the schema's default stands for it."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return OmegaConf.create({k: v for k, v in plain.items() if v is not None})


def _check_trainer(t: TrainerConfig) -> None:
    for name in ("tensor_model", "pipeline_model", "context", "data"):
        _check_least(f"trainer.{name}_parallel_size", getattr(t, f"{name}_parallel_size"), 1)
    for key, least in _LEAST_OF_TRAINER.items():
        _check_least(f"trainer.{key}", getattr(t, key), least)
    if t.precision not in PRECISIONS:
        raise InputError(f"trainer.precision={t.precision}: must be one of {', '.join(PRECISIONS)}")
    if min(t.micro_batch_size, t.global_batch_size) < 1 or t.global_batch_size % (
        t.micro_batch_size * t.data_parallel_size
    ):
        raise InputError(
            f"trainer.global_batch_size={t.global_batch_size}: must be a positive multiple of micro_batch_size "
            f"{t.micro_batch_size} x data_parallel_size {t.data_parallel_size}"
        )
    if t.sequence_parallel and t.tensor_model_parallel_size == 1:
        raise InputError("trainer.sequence_parallel=true: needs trainer.tensor_model_parallel_size above 1")
    if t.context_parallel_size > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise InputError(
            f"trainer.context_parallel_size={t.context_parallel_size}: needs Transformer Engine, which is not here"
        )
    _check_ranks(t)


_LEAST_OF_TRAINER = {
    "num_nodes": 1,
    "max_steps": 0,
    "val_check_interval": 0,
    "limit_val_batches": 0,
    "log_every_n_steps": 1,
}


def _check_ranks(t: TrainerConfig) -> None:
    world = int(os.environ.get("NEMO_MINITRON_NPROC") or os.environ.get("WORLD_SIZE") or 1)
    if world != t.ranks:
        raise InputError(
            f"{world} rank{'s were' if world > 1 else ' was'} started, but the layout needs {t.ranks}: tensor "
            f"{t.tensor_model_parallel_size} x pipeline {t.pipeline_model_parallel_size} x context "
            f"{t.context_parallel_size} x data {t.data_parallel_size} (trainer.*_parallel_size)"
        )
    if t.ranks % t.num_nodes:
        raise InputError(f"trainer.num_nodes={t.num_nodes}: does not divide the layout's ranks, {t.ranks}")


def _check_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{key}={value}: must be at least {least}")


def _check_ranges(recipe: Any) -> None:
    t, length = recipe.trainer, recipe.data.seq_length
    if length < 2:
        raise InputError(f"data.seq_length={length}: must be at least 2 tokens")
    if t.sequence_parallel and length % t.tensor_model_parallel_size:
        raise InputError(
            f"data.seq_length={length}: under trainer.sequence_parallel it must be a multiple of "
            f"trainer.tensor_model_parallel_size={t.tensor_model_parallel_size}"
        )
    for key, seed in (("seed", recipe.seed), ("data.seed", recipe.data.seed)):
        if not 0 <= seed < 2**32:
            raise InputError(f"{key}={seed}: must be in 0 to {2**32 - 1}, as numpy's seeds")
    if recipe.eval.samples is not None and recipe.eval.samples < 1:
        raise InputError(f"eval.samples={recipe.eval.samples}: must be at least 1, or null for all")
    if isinstance(recipe, PruneRecipe):
        _check_least("prune.calibration_samples", recipe.prune.calibration_samples, 1)
        _check_least("prune.control_seeds", recipe.prune.control_seeds, 0)


def cache_dir(data: DataConfig, part: str) -> Path:
    """Where caches live: `data.cache_dir`, else $NEMO_MINITRON_HOME, else the user's cache directory."""
    base = data.cache_dir or os.environ.get("NEMO_MINITRON_HOME")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_minitron")
    return Path(base) / part
