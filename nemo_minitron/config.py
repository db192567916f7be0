"""The schemas of the configuration, and the only place where it is validated.

Hydra composes plain YAML; `parse` merges it into these dataclasses, so that an unknown key or a wrong type is refused
with one line; `layout` has the trainer's part. What needs the model's sizes (targets, layouts) is checked in
`pruning.plan.check_target`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.cluster import ClusterConfig, check_cluster
from nemo_minitron.errors import InputError
from nemo_minitron.layout import TrainerConfig, check_least, check_trainer
from nemo_minitron.synthesis.settings import SynthesizeConfig

SchemaT = TypeVar("SchemaT")


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
    `optuna` the `trials` that its sampler asks for. `distill_steps`: steps of `distill` that each candidate learns from
    the source before it is ranked (arXiv 2407.14679: 400); 0 ranks by the loss right after pruning.
    `distill_candidates`: only so many, the best after pruning; null: all.
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
    distill_steps: int = 0
    distill_candidates: int | None = None


@dataclass
class IntermediateConfig:
    """Residual states to match beside the output. `layers`: teacher layer to student layer, 0-based; "late" maps the
    third from the end of both (arXiv 2407.14679, table 17); null: none. `embedding`: the embeddings' output too. `at`:
    what a layer adds up to, "output", or that after the following "norm". `distance`: "cosine" or "mse". `alpha`: its
    weight; null balances it against the output's loss at every step. `projection`: learned maps to the teacher's width,
    one "shared" or one for "each" state; null: one where the widths differ.
    """

    layers: Any = None
    embedding: bool = False
    at: str = "output"
    distance: str = "cosine"
    alpha: float | None = None
    projection: str | None = None


@dataclass
class DistillConfig:
    """How the student learns.

    `loss` on the output: "forward_kl", "reverse_kl", "jensen_shannon" (with `beta`), each with a `temperature`, over
    the teacher's `top_k` tokens or all, with or without the `tail`'s mass, and `ce_weight` of next-token cross-entropy;
    or "cross_entropy" alone, without a teacher. `from_scratch`: random weights of the student's sizes, for comparison.
    `max_steps` of `global_batch_size` packed sequences, of which the share `sdg_weight` is of the teacher's text in
    `sdg` and the rest of the corpus.
    """

    loss: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int | None = None
    tail: bool = True
    ce_weight: float = 0.0
    from_scratch: bool = False
    sdg_weight: float = 0.0
    max_steps: int = MISSING
    global_batch_size: int = MISSING
    val_check_interval: int = 0
    limit_val_batches: int = 8
    optim: OptimConfig = field(default_factory=OptimConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)


@dataclass
class CacheConfig:
    """What `recipes/cache_teacher.py` keeps of a teacher. `form`: "hidden", its final hidden states, from which every
    loss is exact; or "top_k", its `distill.top_k` largest logits, and the others' log-sum-exp at `distill.temperature`.
    `train_samples`, `valid_samples`: sequences of each split; null: what a distillation with the settings of `distill`
    reads. `shard_mib`: MiB of a shard, which is what a killed run has to do again.
    """

    form: str = "hidden"
    train_samples: int | None = None
    valid_samples: int | None = None
    shard_mib: int = 256


@dataclass
class EvalConfig:
    """`samples`: packed held-out sequences for the LM loss; null: one whole pass over the valid split."""

    samples: int | None = 64


@dataclass
class CommonConfig:
    """What every recipe has. Groups that a recipe does not use are composed all the same and stay untouched.

    `prepared` is the launcher's: what it checked, converted and indexed once, before the ranks started. `cluster` is
    for launchers/slurm.sh; ranks have none.
    """

    run_dir: str = MISSING
    overwrite: bool = False
    seed: int = 1234
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: Any = None
    prune: Any = None
    distill: Any = None
    cache: Any = None
    synthesize: Any = None
    align: Any = None
    search: Any = None
    export: Any = None
    optim: Any = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    source: Any = None
    student: Any = None
    teacher: Any = None
    teacher_cache: str | None = None
    sdg: Any = None
    prepared: Any = None
    cluster: ClusterConfig | None = None


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
    """`recipes/search.py`. `prune`: how units and layers are chosen, and sizes of axes that the grid leaves open;
    `distill`: how candidates learn where `search.distill_steps` is above 0.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class DistillRecipe(CommonConfig):
    """`recipes/distill.py`. `student` and `teacher`: Hugging Face, NeMo 2 or run directories; the teacher may be left
    out where `distill.loss=cross_entropy`. `teacher_cache`: a run of `recipes/cache_teacher.py` to read instead of
    loading a teacher; `verify_cache`: compare its checksums first, which reads all of it once.
    `sdg`: a run directory of `recipes/synthesize.py`, for the teacher's text.
    """

    student: str = MISSING
    teacher: str | None = None
    verify_cache: bool = True
    sdg: str | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class CacheTeacherRecipe(CommonConfig):
    """`recipes/cache_teacher.py`. `distill`: of the runs that will read the cache: how many sequences, which loss."""

    teacher: str = MISSING
    distill: DistillConfig = field(default_factory=DistillConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass
class CorrectTeacherRecipe(CommonConfig):
    """`recipes/correct_teacher.py`. `distill`: the schedule, with `loss: cross_entropy`."""

    teacher: str = MISSING
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class SynthesizeRecipe(CommonConfig):
    """`recipes/synthesize.py`. `teacher`: who writes; `data`: whose openings it goes on with unless it has prompts."""

    teacher: str = MISSING
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)


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
    check_trainer(result.trainer)
    if result.cluster is not None:
        check_cluster(result.cluster, result.trainer)
    _check_ranges(result)
    return result


def _without_nulls(config: DictConfig) -> DictConfig:
    """A group that was not chosen composes to null; the schema's default stands for it."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return OmegaConf.create({k: v for k, v in plain.items() if v is not None})


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
        check_least("prune.calibration_samples", recipe.prune.calibration_samples, 1)
        check_least("prune.control_seeds", recipe.prune.control_seeds, 0)


def cache_dir(data: DataConfig, part: str) -> Path:
    """Where caches live: `data.cache_dir`, else $NEMO_MINITRON_HOME, else the user's cache directory."""
    base = data.cache_dir or os.environ.get("NEMO_MINITRON_HOME")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_minitron")
    return Path(base) / part
