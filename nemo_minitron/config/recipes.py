"""The schemas of the configuration, and the only place where it is validated.

Hydra composes plain YAML; `parse` merges it into these dataclasses, so that an unknown key or a wrong type is refused
with one line; `layout` has the trainer's part. What needs the model's sizes (targets, layouts) is checked in
`pruning.plan.check_target`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.config.budget import settle_tokens
from nemo_minitron.config.by_size import RULES, check_decay, check_given
from nemo_minitron.config.cluster import ClusterConfig, check_cluster
from nemo_minitron.config.data import DataConfig
from nemo_minitron.config.document_limits import check_limits
from nemo_minitron.config.evaluation import EvalConfig
from nemo_minitron.config.logger import LoggerConfig, check_logger
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.ranges import (
    AboveZero,
    Choice,
    Count,
    Files,
    LayerMap,
    NotNegative,
    PathName,
    Positive,
    Range,
    Seed,
    brief,
    check_ranges,
    check_shape,
)
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.synthesize import SynthesizeConfig
from nemo_minitron.config.trainer import TrainerConfig, check_trainer
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.files import obstacle

SchemaT = TypeVar("SchemaT")
Width = Annotated[int, Range(least=1, most=1_000_000)]


@dataclass
class OptimConfig:
    """Megatron-core's Adam under warm-up and cosine decay from `lr` to `min_lr`; `warmup_steps` are optimizer steps.

    What of these three is null goes by the size of what learns, by the table that `by_size` names; null: by none.
    `weight_decay`, `adam_beta1` and `adam_beta2` are Adam's. `clip_grad`: the largest norm of all gradients; 0: any.
    `use_distributed_optimizer`: its states are divided among the data-parallel ranks.
    """

    lr: AboveZero | None = 1e-4
    min_lr: NotNegative | None = 1e-5
    warmup_steps: Count | None = 40
    by_size: Annotated[str, Choice(*RULES)] | None = None
    weight_decay: NotNegative = 0.1
    adam_beta1: Annotated[float, Range(least=0, below=1)] = 0.9
    adam_beta2: Annotated[float, Range(least=0, below=1)] = 0.95
    clip_grad: NotNegative = 1.0
    use_distributed_optimizer: bool = False


@dataclass
class ModelConfig:
    """The architecture that `recipes/pretrain.py` trains from scratch: Llama, in Megatron-core's names.

    `num_layers` layers of `hidden_size` channels with an MLP of `ffn_hidden_size` neurons; `num_attention_heads` heads
    in `num_query_groups` groups that share keys and values, of `kv_channels` channels each.
    `share_embeddings_and_output_weights`: tied embeddings. `rotary_base`: of rotary positions. `init_method_std`: the
    standard deviation of the first weights.
    """

    num_layers: Annotated[int, Range(least=1, most=10_000)] = MISSING
    hidden_size: Width = MISSING
    ffn_hidden_size: Width = MISSING
    num_attention_heads: Width = MISSING
    num_query_groups: Width = MISSING
    kv_channels: Width = MISSING
    share_embeddings_and_output_weights: bool = False
    rotary_base: AboveZero = 10000.0
    init_method_std: AboveZero = 0.02


@dataclass
class IntermediateConfig:
    """Residual states to match beside the output. `layers`: teacher layer to student layer, 0-based; "late" maps the
    third from the end of both (arXiv 2407.14679, table 17); null: none. `embedding`: the embeddings' output too. `at`:
    what a layer adds up to, "output", or that after the following "norm". `distance`: "cosine" or "mse". `alpha`: its
    weight; null balances it against the output's loss at every step. `projection`: learned maps to the teacher's width,
    one "shared" or one for "each" state; null: one where the widths differ.
    """

    layers: LayerMap = None
    embedding: bool = False
    at: Annotated[str, Choice("output", "norm")] = "output"
    distance: Annotated[str, Choice("cosine", "mse")] = "cosine"
    alpha: AboveZero | None = None
    projection: Annotated[str, Choice("shared", "each")] | None = None


@dataclass
class ConversationsConfig:
    """Conversations to learn from, in their answers only.

    `weight`: their share of the training sequences; 0: the corpus alone. `train` and `valid`: files of conversations
    (`data.records`); null: the project's own set. `chat_template`: a Jinja file; null: the tokenizer's own.
    `merge_system`: put a system's text in front of the user's first, for templates that know no system. `overlong`:
    what is done with those of more than `data.seq_length` tokens: "refuse", "drop" or "cut". `packed`: as many in a
    sequence as there is room for; false: one.
    """

    weight: Annotated[float, Range(least=0, most=1)] = 0.0
    train: Files = None
    valid: Files = None
    chat_template: PathName | None = None
    merge_system: bool = False
    overlong: Annotated[str, Choice("drop", "cut", "refuse")] = "refuse"
    packed: bool = True


@dataclass
class DistillConfig:
    """How the student learns.

    `loss` on the output: "forward_kl", "reverse_kl", "jensen_shannon" (with `beta`), each with a `temperature`, over
    the teacher's `top_k` tokens or all, with or without the `tail`'s mass, and `ce_weight` of next-token cross-entropy;
    or "cross_entropy" alone, without a teacher. `from_scratch`: random weights of the student's sizes, for comparison.
    `max_steps` of `global_batch_size` packed sequences, of which the share `sdg_weight` is of the teacher's text in
    `sdg` and the rest of the corpus; `conversations` may take the place of some or of all. `val_check_interval`: steps
    from one validation and checkpoint to the next; 0: only at the end. `limit_val_batches`: global batches of a
    validation.
    """

    loss: Annotated[str, Choice("forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy")] = "forward_kl"
    temperature: Annotated[float, Range(above=0, most=1000)] = 1.0
    beta: Annotated[float, Range(above=0, below=1)] = 0.5
    top_k: Positive | None = None
    tail: bool = True
    ce_weight: NotNegative = 0.0
    from_scratch: bool = False
    sdg_weight: Annotated[float, Range(least=0, most=1)] = 0.0
    max_steps: Positive = MISSING
    global_batch_size: Positive = MISSING
    val_check_interval: Count = 0
    limit_val_batches: Positive = 8
    optim: OptimConfig = field(default_factory=OptimConfig)
    conversations: ConversationsConfig = field(default_factory=ConversationsConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)


@dataclass
class CacheConfig:
    """What `recipes/cache_teacher.py` keeps of a teacher. `form`: "hidden", its final hidden states, from which every
    loss is exact; or "top_k", its `distill.top_k` largest logits, and the others' log-sum-exp at `distill.temperature`.
    `train_samples`, `valid_samples`: sequences of each split; null: what a distillation with the settings of `distill`
    reads. `shard_mib`: MiB of a shard, which is what a killed run has to do again.
    """

    form: Annotated[str, Choice("hidden", "top_k")] = "hidden"
    train_samples: Positive | None = None
    valid_samples: Positive | None = None
    shard_mib: Annotated[int, Range(least=1, most=1_048_576)] = 256


@dataclass
class CommonConfig:
    """What every recipe has. Groups that a recipe does not use are composed all the same and stay untouched.

    `run_dir`: where a run writes. `overwrite`: whether a finished run there is replaced. `seed`: of random weights,
    sampling and dropout; the order of documents has `data.seed`.

    `prepared` is the launcher's: what it checked, converted and indexed once, before the ranks started. `cluster` is
    for launchers/slurm.sh; ranks have none.
    """

    run_dir: PathName = MISSING
    overwrite: bool = False
    seed: Seed = 1234
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: Any = None
    model: Any = None
    prune: Any = None
    distill: Any = None
    cache: Any = None
    synthesize: Any = None
    align: Any = None
    search: Any = None
    export: Any = None
    merge: Any = None
    pipeline: Any = None
    optim: Any = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    source: Any = None
    student: Any = None
    teacher: Any = None
    teacher_cache: PathName | None = None
    sdg: Any = None
    prepared: Any = None
    cluster: ClusterConfig | None = None


@dataclass
class PretrainRecipe(CommonConfig):
    """`recipes/pretrain.py`. `export_dir`: where the trained model is also written in Hugging Face format."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export_dir: PathName | None = None
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class ScoredRecipe(CommonConfig):
    """What prunes one model. `source`: a Hugging Face, NeMo 2 or run directory, or a GGUF file."""

    source: PathName = MISSING
    prune: PruneConfig = field(default_factory=PruneConfig)


@dataclass
class PruneRecipe(ScoredRecipe):
    """`recipes/prune.py`. `source`: a Hugging Face directory, a NeMo 2 directory, a GGUF file, or a run directory that
    holds one. `stream`: a Hugging Face directory is scored a layer at a time, where scores are not given, and pruned a
    block of rows at a time into another, in one process: for models that no memory here holds. `shard_size`: of a
    file of its weights at most, in bytes or as "5GB".
    """

    stream: bool = False
    shard_size: str = "5GB"


@dataclass
class SearchRecipe(ScoredRecipe):
    """`recipes/search.py`. `source`: as of prune. `prune`: how units and layers are chosen, and sizes of axes that the
    grid leaves open; `distill`: how candidates learn where `search.distill_steps` is above 0.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class DistillRecipe(CommonConfig):
    """`recipes/distill.py`. `student` and `teacher`: Hugging Face, NeMo 2 or run directories; without a teacher it is
    what the student was pruned from, and none where `distill.loss=cross_entropy`. `teacher_cache`: a run of
    `recipes/cache_teacher.py` to read instead of loading a teacher; `verify_cache`: compare its checksums first, which
    reads all of it once. `sdg`: a run directory of `recipes/synthesize.py`, for the teacher's text.
    """

    student: PathName = MISSING
    teacher: PathName | None = None
    teacher_cache: PathName | None = None
    verify_cache: bool = True
    sdg: PathName | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class CacheTeacherRecipe(CommonConfig):
    """`recipes/cache_teacher.py`. `teacher`: a checkpoint. `distill`: of the runs that will read the cache: how many
    sequences, which loss. `stream`: the teacher is a Hugging Face directory of which one layer is in memory at a time,
    in one process: for one that no memory here holds.
    """

    teacher: PathName = MISSING
    stream: bool = False
    distill: DistillConfig = field(default_factory=DistillConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass
class CorrectTeacherRecipe(CommonConfig):
    """`recipes/correct_teacher.py`. `teacher`: a checkpoint. `distill`: the schedule, with `loss: cross_entropy`."""

    teacher: PathName = MISSING
    distill: DistillConfig = field(default_factory=DistillConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class SynthesizeRecipe(CommonConfig):
    """`recipes/synthesize.py`. `teacher`: who writes; `data`: whose openings it goes on with unless it has prompts."""

    teacher: PathName = MISSING
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)


def parse(schema: type[SchemaT], config: DictConfig) -> SchemaT:
    """Merge a composed configuration into a schema and check it.

    Raises:
        InputError: an unknown key, a missing or wrongly typed value, one outside its range, an impossible layout or
            batch.
    """
    try:
        plain = _without_nulls(config)
        check_shape(schema, plain)
        result: Any = OmegaConf.to_object(merged(schema, plain))
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        told = re.search(r"full_key: (\S+)", str(error))
        key = getattr(error, "full_key", None) or (told and told[1])
        reason = brief(first_line(error))
        raise InputError(f"{key}: {reason}" if key and key not in reason else reason) from None
    if result.prepared is not None and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        raise InputError("prepared: is what a launcher hands to its ranks; leave it out")
    check_ranges(result)
    settle_tokens(result)
    check_trainer(result.trainer, is_pipeline=is_dataclass(result.pipeline))
    if isinstance(result.logger, LoggerConfig):
        check_logger(result.logger)
    if result.cluster is not None:
        check_cluster(result.cluster, result.trainer)
    _check_together(result)
    if (place := obstacle(cache_dir(result.data, ""))) is not None:
        raise InputError(
            f"data.cache_dir={result.data.cache_dir}: {place} is no directory that can be written to"
        )
    return result


def merged(schema: type[Any], config: Mapping[Any, Any]) -> DictConfig:
    """A composed configuration in its schema, not checked; what is null takes the schema's default."""
    plain = {name: value for name, value in config.items() if value is not None}
    found = OmegaConf.merge(OmegaConf.structured(schema), plain)
    assert isinstance(found, DictConfig)
    return found


def _without_nulls(config: DictConfig) -> dict[Any, Any]:
    """A group that was not chosen composes to null; the schema's default stands for it."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {k: v for k, v in plain.items() if v is not None}


def _check_together(recipe: Any) -> None:
    """What two settings must be to each other."""
    t, length = recipe.trainer, recipe.data.seq_length
    if t.sequence_parallel and length % t.tensor_model_parallel_size:
        raise InputError(
            f"data.seq_length={length}: under trainer.sequence_parallel it must be a multiple of "
            f"trainer.tensor_model_parallel_size={t.tensor_model_parallel_size}"
        )
    check_limits(recipe.data, t.context_parallel_size)
    for group in ("", "distill", "align"):
        o = getattr(getattr(recipe, group) if group else recipe, "optim", None)
        if isinstance(o, OptimConfig):
            key = f"{group}.optim".lstrip(".")
            check_decay(o, key)
            if not group:
                check_given(o, key)


def cache_dir(data: DataConfig, part: str) -> Path:
    """Where caches live: `data.cache_dir`, else $NEMO_MINITRON_HOME, else the user's cache directory."""
    base = data.cache_dir or os.environ.get("NEMO_MINITRON_HOME")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_minitron")
    return Path(base) / part
