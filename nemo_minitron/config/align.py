"""The schemas of the alignment recipes' configuration."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.logger import LoggerConfig
from nemo_minitron.config.ranges import (
    AboveZero,
    Choice,
    Count,
    Files,
    NotNegative,
    PathName,
    Positive,
    Range,
)
from nemo_minitron.config.recipes import CommonConfig, OptimConfig

LoraTarget = Annotated[
    str, Choice("attention", "mlp", "all", "attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
]


@dataclass
class LoraConfig:
    """Low-rank adapters: `dim` of each, `alpha` (null: `dim`), `dropout` of what goes into them, `target_modules`: the
    layers that get one ("attention", "mlp", "all", or single linears of them).
    """

    dim: Positive = 8
    alpha: Positive | None = None
    dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    target_modules: list[LoraTarget] = field(default_factory=lambda: ["all"])


@dataclass
class DpoConfig:
    """NeMo-Aligner's preference losses, in its names: `preference_loss` is "dpo", "ipo", "rpo_bwd_kl", "rpo_fwd_kl" or
    "rpo_sq"; the last three compare with the rewards in the data, times `gt_reward_scale`.
    `ref_policy_kl_penalty`: how far the student may leave where it began (the papers' beta; more is less far).
    `preference_average_log_probs`: an answer's log-probability a token, not their sum. `preference_loss_weight` of that
    loss, `sft_loss_weight` of the next-token loss of chosen answers beside it.
    """

    preference_loss: Annotated[str, Choice("dpo", "ipo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")] = "dpo"
    ref_policy_kl_penalty: AboveZero = 0.1
    preference_average_log_probs: bool = False
    gt_reward_scale: NotNegative = 1.0
    preference_loss_weight: NotNegative = 1.0
    sft_loss_weight: NotNegative = 0.0


@dataclass
class AlignConfig:
    """How a student learns from conversations.

    `train` and `valid`: files of conversations (`data.records`); null: the project's own set. `chat_template`: a
    Jinja file; null: the tokenizer's own. `merge_system`: put a system's text in front of the user's first, for
    templates that know no system; false: leave it to the template. `overlong`: what is done with samples of more than
    `data.seq_length` tokens: "refuse", "drop" or "cut". `replay`: the share of the training samples that are corpus
    text, in sequences of `data.seq_length`, so that it is not forgotten; of sft alone. `max_steps` null: `max_epochs`
    passes. `samples`: held-out prompts whose greedy answers, of up to `samples_max_new_tokens` tokens, are written into
    RUN/samples.jsonl at each validation. `peft`: "none", all weights, or "lora". `save_nemo`: also write
    NeMo-Aligner's own .nemo file.

    `global_batch_size`: samples of a step. `val_check_interval`: steps from one validation and checkpoint to the next;
    0: only at the end. `limit_val_batches`: of a validation; null: all. `packed_sequence`: must be false, since
    NeMo-Aligner does not pack conversations.
    """

    train: Files = None
    valid: Files = None
    chat_template: PathName | None = None
    merge_system: bool = False
    overlong: Annotated[str, Choice("drop", "cut", "refuse")] = "refuse"
    replay: Annotated[float, Range(least=0, below=1)] = 0.0
    packed_sequence: bool = False
    max_epochs: Positive = 1
    max_steps: Positive | None = None
    global_batch_size: Positive = 8
    val_check_interval: Count = 0
    limit_val_batches: Positive | None = None
    samples: Count = 0
    samples_max_new_tokens: Positive = 64
    peft: Annotated[str, Choice("none", "lora")] = "none"
    lora: LoraConfig = field(default_factory=LoraConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    save_nemo: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class SftRecipe(CommonConfig):
    """`recipes/sft.py`. `student`: a Hugging Face, NeMo 2 or run directory."""

    student: PathName = MISSING
    align: AlignConfig = field(default_factory=AlignConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class PreferenceRecipe(SftRecipe):
    """`recipes/preference.py`. `student`: as of sft. `align.train` and `align.valid`: JSONL files of a prompt and two
    answers.
    """
