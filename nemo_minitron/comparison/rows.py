"""What is compared: a row a measure, a cell a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_minitron.comparison.groups import GROUPS, OTHERS, group_of, head
from nemo_minitron.comparison.measured import Evaluation, Score
from nemo_minitron.comparison.paired import Difference, difference, loss_difference
from nemo_minitron.comparison.training import Training

TEXT_GROUP = "held-out text"
# Field of an evaluation's result, name of the row. Those of tokens are comparable under one tokenizer only.
_OF_BYTES = (("bits_per_byte", "bits a byte"),)
_OF_TOKENS = (
    ("lm_loss_nats", "LM loss, nats a token"),
    ("perplexity", "perplexity"),
    ("token_accuracy", "token accuracy"),
)


@dataclass(frozen=True)
class Speed:
    """Measured in turns with the other models. Each list has a value a turn.

    Attributes:
        engine: "transformers" or "llama.cpp".
        first_s: seconds from the prompt to the first token.
        tokens_per_s: of the tokens after it.
        memory_gib: the peak above what the process had before the model was loaded; `device`: where, "cpu" or "cuda".
    """

    engine: str
    device: str
    first_s: list[float]
    tokens_per_s: list[float]
    memory_gib: list[float]


@dataclass(frozen=True)
class Model:
    """One of those that are compared; None is what is not known.

    `bytes`: of the weights that the speed was measured of.
    """

    name: str
    evaluation: Evaluation
    parameters: int | None
    non_embedding: int | None
    training: Training
    bytes: int | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Cell:
    """A model's value in a row. `difference`: from the baseline's, None in its own cell."""

    value: float
    stderr: float | None = None
    items: int | None = None
    chance: float | None = None
    at_chance: bool = False
    difference: Difference | None = None


@dataclass(frozen=True)
class Row:
    """`cells` by the model's name; a model that lacks one was not asked. No cells: nothing of the group was run."""

    group: str
    name: str
    cells: dict[str, Cell] = field(default_factory=dict)


def score_rows(models: Sequence[Model], baseline: Model) -> list[Row]:
    """Benchmarks, the four groups first, each with at least one row."""
    shown = {model.name: {s.name: s for s in model.evaluation.shown if group_of(s)} for model in models}
    rows = []
    for group, name in head([score for scores in shown.values() for score in scores.values()]):
        if name is None:
            rows.append(Row(group, "not run"))
            continue
        of = {m.name: (m, shown[m.name][name]) for m in models if name in shown[m.name]}
        cells = {
            key: _cell(model, score, baseline, name in shown[baseline.name])
            for key, (model, score) in of.items()
        }
        rows.append(Row(group, name, cells))
    return rows


def _cell(model: Model, score: Score, baseline: Model, asked: bool) -> Cell:
    found = None
    if model is not baseline:
        found = (
            difference(baseline.evaluation, model.evaluation, score)
            if asked
            else Difference(why="the baseline was not asked")
        )
    return Cell(score.value, score.stderr, score.items, score.chance, score.at_chance, found)


def text_rows(models: Sequence[Model], baseline: Model) -> tuple[list[Row], list[str]]:
    """Held-out text: bits a byte of all that read the same corpus, the rest of those with the baseline's tokens; and a
    line for each model that something is left out of."""
    said: list[str] = []
    read = [m for m in models if m.evaluation.number("bits_per_byte") is not None]
    first = baseline if baseline in read else (read or [baseline])[0]
    corpus = [m for m in read if _text_of(m) == _text_of(first)]
    tokens = [m for m in corpus if _tokens_of(m) == _tokens_of(first)]
    said += [
        f"{m.name}: its held-out text is another than {first.name}'s; left out"
        for m in read
        if m not in corpus
    ]
    said += [
        f"{m.name}: its tokens are not {first.name}'s, so perplexity and LM loss cannot be compared and are left out; "
        "bits a byte can"
        for m in corpus
        if m not in tokens
    ]
    rows = []
    for group, columns in ((corpus, _OF_BYTES), (tokens, _OF_TOKENS)):
        for key, name in columns:
            cells = {m.name: _text_cell(m, first, key) for m in group}
            if cells:
                rows.append(Row(TEXT_GROUP, name, cells))
    return rows, said


def _text_cell(model: Model, first: Model, key: str) -> Cell:
    value = model.evaluation.number(key)
    assert value is not None
    if key != "lm_loss_nats":
        return Cell(value)
    found = None if model is first else loss_difference(first.evaluation, model.evaluation)
    samples = model.evaluation.number("lm_samples")
    return Cell(value, model.evaluation.number("lm_loss_stderr"), int(samples or 0), difference=found)


def _text_of(model: Model) -> tuple[object, ...]:
    result = model.evaluation.result
    return tuple(result.get(key) for key in ("data", "data_sha256", "lm_seq_length", "lm_samples"))


def _tokens_of(model: Model) -> tuple[object, ...]:
    """What two models with one tokenizer have in common; a run of an earlier version did not keep its hash."""
    result = model.evaluation.result
    return tuple(result.get(key) for key in ("tokenizer_sha256", "lm_tokens", "lm_bytes"))


def quality(
    rows: Sequence[Row], models: Sequence[Model]
) -> tuple[str, dict[str, tuple[float, float]], float | None]:
    """What stands for quality in the picture: the mean of the benchmarks that all models were asked.

    Returns:
        A title, by model the mean and its standard error (items of different benchmarks are drawn independently), and
        what a guess scores where all of them can be guessed. Without a common benchmark the mapping is empty.
    """
    names = [model.name for model in models]
    common = [
        r
        for r in rows
        if r.group in (*GROUPS, OTHERS) and set(r.cells) == set(names) and "rating" not in r.name
    ]
    if not common:
        return "", {}, None
    count = len(common)
    found = {}
    for name in names:
        cells = [row.cells[name] for row in common]
        error = sum((cell.stderr or 0.0) ** 2 for cell in cells) ** 0.5 / count
        found[name] = (sum(cell.value for cell in cells) / count, error)
    chances = [next(iter(row.cells.values())).chance for row in common]
    chance = sum(c for c in chances if c is not None) / count if None not in chances else None
    title = common[0].name if count == 1 else f"mean of {count} benchmarks"
    return title, found, chance
