"""What `recipes/compare.py` refuses before a model is loaded, and what it knows of each by then."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.checkpoints.any_family import AnyModel, find_any, is_of_another_family
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.comparison.measured import Evaluation, read_evaluation
from nemo_minitron.config.compare import CompareRecipe
from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import catalogue
from nemo_minitron.files import read_text, real, user_path
from nemo_minitron.workflows.chat.check import exported, gguf_at
from nemo_minitron.workflows.evaluate.check import examine
from nemo_minitron.workflows.one_process import OneProcess, check_one_process

EVALUATIONS = "evaluations"
_PROMPT = (
    "A large model is trained first, since it learns most from the text that there is. Which of its layers, heads and "
    "neurons matter is then measured on a few hundred pages: what the rest adds up to is small, and is taken out. The "
    "small model that is left has forgotten some of what it knew, and learns it again from the large one's answers. "
)


@dataclass(frozen=True)
class Contender:
    """One of the models.

    Attributes:
        name: in the table, and of its directory.
        given: as the user named it.
        source: the model itself, as recipes/evaluate.py takes it; its chain of runs begins there.
        evaluation: a finished one that was given; None: it is made.
        key: of what an evaluation is made of, when it is made.
        checkpoint: what is measured and counted; None: the evaluation's model is no longer there.
        file: a GGUF file; its `checkpoint` is then the directory made of it.
        tokens: the prompt of the speed measurement.
    """

    name: str
    given: str
    source: str
    evaluation: Evaluation | None
    key: str
    checkpoint: Source | AnyModel | None
    file: Path | None
    tokens: list[int]

    @property
    def backend(self) -> str:
        """Of the evaluation."""
        return "hf" if isinstance(self.checkpoint, AnyModel) else "megatron"


@dataclass(frozen=True)
class Prepared(OneProcess):
    """The models, in order."""

    contenders: list[Contender]
    baseline: str


def check(r: CompareRecipe) -> Prepared:
    """Refuse what cannot be compared.

    Raises:
        InputError: names the value.
    """
    check_one_process(r.trainer, "compare", "; evaluate sharded models first and give the runs")
    names = _names(r)
    baseline = _baseline(r, names)
    contenders = [_contender(r, name, given) for name, given in zip(names, r.models, strict=True)]
    if any(one.evaluation is None for one in contenders):
        # Once for all models: a missing file or a bad line is refused before the first is loaded.
        catalogue.load(catalogue.parse_names(r.eval.tasks), r.data)
    return Prepared(contenders, baseline)


def _names(r: CompareRecipe) -> list[str]:
    """Of each model, no two alike, each fit for a directory."""
    if not r.models:
        raise InputError("models=[]: must name at least one model, such as models=[DIR,RUN,FILE.gguf]")
    found: dict[Path, str] = {}
    for given in r.models:
        place = real(given)
        if place in found:
            raise InputError(f"models={given}: is there twice")
        if not place.exists():
            raise InputError(f"models={given}: no such file or directory")
        found[place] = given
    if not r.compare.names:
        return _last_parts(list(found))
    if len(r.compare.names) != len(r.models):
        raise InputError(f"compare.names: has {len(r.compare.names)} names for {len(r.models)} models")
    for name in r.compare.names:
        if not re.fullmatch(r"[\w][\w .()+-]{0,59}", name):
            raise InputError(
                f"compare.names={name}: must be 1 to 60 letters, digits, spaces and _ . ( ) + -, no sign first"
            )
        if r.compare.names.count(name) > 1:
            raise InputError(f"compare.names={name}: is there twice")
    return r.compare.names


def _last_parts(places: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others."""
    for count in range(1, 1 + max(len(place.parts) for place in places)):
        names = [re.sub(r"[^\w.()+-]", "-", "-".join(place.parts[-count:])).strip("-.") for place in places]
        if len(set(names)) == len(names) and all(names):
            break
    return [name[-60:].strip("-.") for name in names]


def _baseline(r: CompareRecipe, names: list[str]) -> str:
    wanted = r.compare.baseline
    if wanted is None or wanted in names:
        return wanted or names[0]
    place = real(wanted)
    for name, given in zip(names, r.models, strict=True):
        if real(given) == place:
            return name
    raise InputError(f"compare.baseline={wanted}: is not among models; those are {', '.join(names)}")


def _contender(r: CompareRecipe, name: str, given: str) -> Contender:
    where, path = f"models={given}", exported(user_path(given))
    evaluation = _evaluation(path, where)
    source, key = str(path.absolute()), ""
    if evaluation is not None:
        checkpoint, file = _measured(r, evaluation, where)
        source = str(evaluation.result.get("source", source))
    else:
        checkpoint, file = _found(r, path, "models")
        key = _checked(r, str(file or source), checkpoint, where)
    tokens = _prompt(r, checkpoint, where) if checkpoint is not None and r.compare.speed else []
    return Contender(name, given, source, evaluation, key, checkpoint, file, tokens)


def _evaluation(path: Path, where: str) -> Evaluation | None:
    """A finished run of recipes/evaluate.py; None for anything else.

    Raises:
        InputError: one that is not finished.
    """
    if not (path / RESULT).is_file():
        try:
            begun = read_text(path / "config.yaml").startswith("# python recipes/evaluate.py")
        except (OSError, ValueError):
            begun = False
        if begun:
            raise InputError(
                f"{where}: this evaluation did not finish (no {RESULT}); its command goes on from there"
            )
        return None
    try:
        recipe = json.loads(read_text(path / RESULT)).get("recipe")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return read_evaluation(path, where) if recipe == "evaluate" else None


def _found(r: CompareRecipe, path: Path, key: str) -> tuple[Source | AnyModel, Path | None]:
    """A checkpoint, and the GGUF file that it was made of."""
    file = gguf_at(path, key)
    if file is None and is_of_another_family(path):
        return find_any(path, key), None
    return find_source(file or path, key, r.data), file


def _measured(
    r: CompareRecipe, evaluation: Evaluation, where: str
) -> tuple[Source | AnyModel | None, Path | None]:
    """What a finished evaluation measured, if it is still there and still the same."""
    source = evaluation.result.get("source")
    if not isinstance(source, str) or not Path(source).exists():
        return None, None
    try:
        checkpoint, file = _found(r, exported(Path(source)), f"{where}: source")
    except InputError:
        return None, None
    if evaluation.result.get("source_sha256") != checkpoint.sha256():
        raise InputError(f"{where}: its source={source} has other weights now; evaluate it again")
    return checkpoint, file


def _checked(r: CompareRecipe, source: str, checkpoint: Source | AnyModel, where: str) -> str:
    """Refuse what recipes/evaluate.py would; the key of all that its result comes from."""
    asked = r.eval
    if isinstance(checkpoint, AnyModel):
        asked = dataclasses.replace(asked, backend="hf")
    recipe = EvaluateRecipe(
        run_dir=r.run_dir, seed=r.seed, data=r.data, trainer=r.trainer, eval=asked, source=source
    )
    try:
        found = examine(recipe, read_benchmarks=False)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix(f'source={source}: ')}") from None
    made_of = {
        "weights": found.source_sha256,
        "text": None if found.data is None else found.data.indexed.manifest_sha256,
        "asked": [dataclasses.asdict(part) for part in (recipe.data, recipe.trainer, recipe.eval)],
        "seed": r.seed,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _prompt(r: CompareRecipe, checkpoint: Source | AnyModel, where: str) -> list[int]:
    """So many tokens of one text, by the model's own tokenizer."""
    c = r.compare
    if c.prompt_tokens + c.new_tokens > checkpoint.seq_length:
        raise InputError(
            f"{where}: compare.prompt_tokens={c.prompt_tokens} and compare.new_tokens={c.new_tokens} are more than the "
            f"{checkpoint.seq_length} tokens that it was made for"
        )
    tokens = load_tokenizer(checkpoint.tokenizer).encode(_PROMPT, add_special_tokens=False)
    if not tokens:
        raise InputError(f"{where}: its tokenizer makes no tokens of English text")
    return (tokens * (1 + c.prompt_tokens // len(tokens)))[: c.prompt_tokens]
