"""The schemas of `recipes/instruct_data.py` and `recipes/evaluate_instruct.py`; `config.parse` checks them."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.ranges import Choice, PathName, Positive, Range, Seed
from nemo_minitron.config.recipes import CommonConfig

Samples = Annotated[int, Range(least=1, most=1_000_000)]


@dataclass
class InstructSizes:
    """Samples of each of the four categories by file of the project's own instruct set: `train` to learn from; held out
    `valid` and `test`, of other wordings, and `seen`, of the wordings of training; `preference_train` and
    `preference_valid` for pairs.
    """

    train: Samples = 1500
    seen: Samples = 50
    valid: Samples = 50
    test: Samples = 100
    preference_train: Samples = 400
    preference_valid: Samples = 50


@dataclass
class InstructDataConfig:
    """What `recipes/instruct_data.py` makes files of.

    `input`: a JSONL file in one of the formats of `data.chat.formats`; null: the project's own set, of `sizes`, is
    generated. `format`: one of them, or "auto". `kind`: "conversations", or "preferences" for chosen and rejected
    answers. `tokenizer`: a Hugging Face directory, id or checkpoint that the texts are tried with; null: lengths and
    control tokens stay unchecked. `max_tokens`: the context; longer samples are left out, cut or refused as `overlong`
    says ("drop", "cut", "refuse"). `valid_fraction`: of the input, held out by the prompts' hash.
    """

    input: PathName | None = None
    format: Annotated[
        str, Choice("auto", "messages", "alpaca", "self_instruct", "sharegpt", "nemo", "prompt")
    ] = "auto"
    kind: Annotated[str, Choice("conversations", "preferences")] = "conversations"
    tokenizer: PathName | None = None
    max_tokens: Positive | None = None
    overlong: Annotated[str, Choice("drop", "cut", "refuse")] = "refuse"
    valid_fraction: Annotated[float, Range(least=0, below=1)] = 0.0
    sizes: InstructSizes = field(default_factory=InstructSizes)


@dataclass
class InstructEvalConfig:
    """How `recipes/evaluate_instruct.py` asks and scores.

    `file`: a JSONL file of conversations with `category` and `checks`; null: the `split` ("test", "seen" or "valid") of
    the project's own set, generated with `seed` and `sizes`. `merge_system`: put a system's text in front of the user's
    first, for templates that know no system. Answers are greedy, of up to `max_new_tokens` tokens;
    `batch_size` prompts at a time. `limit`: so many of the prompts, evenly over the file; null: all. `gguf`: a GGUF
    file of the same model, or the directory with it, whose greedy answers by llama.cpp must be the same; null: none.
    """

    file: PathName | None = None
    split: Annotated[str, Choice("test", "seen", "valid")] = "test"
    seed: Seed = 1234
    sizes: InstructSizes = field(default_factory=InstructSizes)
    merge_system: bool = False
    max_new_tokens: Positive = 64
    batch_size: Positive = 50
    limit: Positive | None = None
    gguf: PathName | None = None


@dataclass
class InstructDataRecipe(CommonConfig):
    """`recipes/instruct_data.py`. `seed`: of the generated set, and of nothing else."""

    instruct_data: InstructDataConfig = field(default_factory=InstructDataConfig)


@dataclass
class EvaluateInstructRecipe(CommonConfig):
    """`recipes/evaluate_instruct.py`. `source`: a Hugging Face, NeMo 2 or run directory."""

    source: PathName = MISSING
    instruct: InstructEvalConfig = field(default_factory=InstructEvalConfig)
