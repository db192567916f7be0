"""The schemas of `recipes/instruct_data.py` and `recipes/evaluate_instruct.py`; `config.parse` checks them."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config import CommonConfig


@dataclass
class InstructSizes:
    """Samples of each of the four categories by file of the project's own instruct set."""

    train: int = 1500
    seen: int = 50
    valid: int = 50
    test: int = 100
    preference_train: int = 400
    preference_valid: int = 50


@dataclass
class InstructDataConfig:
    """What `recipes/instruct_data.py` makes files of.

    `input`: a JSONL file in one of the shapes of `data.chat_shapes`; null: the project's own set, of `sizes`, is
    generated. `shape`: one of them, or "auto". `kind`: "conversations", or "preferences" for chosen and rejected
    answers. `tokenizer`: a Hugging Face directory, id or checkpoint that the texts are tried with; null: lengths and
    control tokens stay unchecked. `max_tokens`: the context; longer samples are left out, cut or refused as `too_long`
    says ("drop", "cut", "refuse"). `valid_fraction`: of the input, held out by the prompts' hash.
    """

    input: str | None = None
    shape: str = "auto"
    kind: str = "conversations"
    tokenizer: str | None = None
    max_tokens: int | None = None
    too_long: str = "refuse"
    valid_fraction: float = 0.0
    sizes: InstructSizes = field(default_factory=InstructSizes)


@dataclass
class InstructEvalConfig:
    """How `recipes/evaluate_instruct.py` asks and scores.

    `file`: a JSONL file of conversations with `category` and `checks`; null: the `split` ("test", "seen" or "valid") of
    the project's own set, generated with `seed` and `sizes`. Answers are greedy, of up to `max_new_tokens` tokens;
    `batch_size` prompts at a time.
    """

    file: str | None = None
    split: str = "test"
    seed: int = 1234
    sizes: InstructSizes = field(default_factory=InstructSizes)
    max_new_tokens: int = 64
    batch_size: int = 50


@dataclass
class InstructDataRecipe(CommonConfig):
    """`recipes/instruct_data.py`. `seed`: of the generated set, and of nothing else."""

    instruct_data: InstructDataConfig = field(default_factory=InstructDataConfig)


@dataclass
class EvaluateInstructRecipe(CommonConfig):
    """`recipes/evaluate_instruct.py`. `source`: a Hugging Face, NeMo 2 or run directory."""

    source: str = MISSING
    instruct: InstructEvalConfig = field(default_factory=InstructEvalConfig)
