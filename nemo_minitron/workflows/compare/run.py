"""The work of `recipes/compare.py`: evaluate what is not evaluated, time all models in turns, write the tables."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.any_family import AnyModel
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.comparison import picture, rows, table
from nemo_minitron.comparison.measured import Evaluation, read_evaluation
from nemo_minitron.comparison.rows import Model, Speed
from nemo_minitron.comparison.training import training_of
from nemo_minitron.config.compare import CompareRecipe
from nemo_minitron.environment import peak_rss_gib, with_package
from nemo_minitron.errors import FailedRun
from nemo_minitron.files import remove_stale, write_text
from nemo_minitron.workflows.compare.check import EVALUATIONS, Contender, Prepared
from nemo_minitron.workflows.pipeline.check import shared_overrides
from nemo_minitron.workflows.pipeline.run import make
from nemo_minitron.workflows.pipeline.state import State
from nemo_minitron.workflows.pipeline.steps import Step

CSV, MARKDOWN, PICTURE = "compare.csv", "compare.md", "compare.png"


def run(r: CompareRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Measure and write compare.csv, compare.md and compare.png.

    Returns:
        The fields of `result.json`; `models` has what the tables say, by name.

    Raises:
        FailedRun: a model could not be evaluated or timed; what was finished stays.
        InterruptedRun: an evaluation was told to end.
    """
    evaluations = _evaluated(prepared, directory)
    weights = {one.name: _weights(r, one) for one in prepared.contenders}
    speeds = _timed(r, prepared, weights) if r.compare.speed else {}
    models = [_model(r, one, evaluations[one.name], weights[one.name], speeds) for one in prepared.contenders]
    found = _table(r, prepared, models, directory)
    write_text(directory / CSV, table.as_csv(found))
    write_text(directory / MARKDOWN, table.as_markdown(found))
    drawn = picture.draw(models, found.scores, found.text, remove_stale(directory / PICTURE))
    for line in found.said:
        print(line, file=sys.stderr, flush=True)
    return _fields(found, directory, drawn=drawn)


def _evaluated(prepared: Prepared, directory: Path) -> dict[str, Evaluation]:
    """One model after the other, each in a process of its own; those that are made stay."""
    state = State((directory / EVALUATIONS).absolute())
    found = {}
    for number, one in enumerate(prepared.contenders, 1):
        if one.evaluation is not None:
            found[one.name] = one.evaluation
            continue
        place = state.run_dir / one.name
        where = f"{number}/{len(prepared.contenders)} {one.name}"
        if state.is_done(one.name, one.key):
            _say(f"{where}: evaluated before")
        else:
            _say(f"{where}: is evaluated")
            state.run_dir.mkdir(parents=True, exist_ok=True)
            state.begin(one.name, one.key, one.key)
            make(Step(one.name, "evaluate", _overrides(one, place), place, ()), 1, state)
        found[one.name] = read_evaluation(place, str(place))
    return found


def _overrides(one: Contender, place: Path) -> tuple[str, ...]:
    """What was typed of data, trainer, eval and seed for this command; the model; where it goes."""
    backend = ["eval.backend=hf"] if one.backend == "hf" else []
    return (*shared_overrides(), *backend, f"source={one.file or one.source}", f"run_dir={place}")


def _weights(r: CompareRecipe, one: Contender) -> Path | None:
    """What the speed is measured of: a GGUF file, or a Hugging Face directory; None: it is not there."""
    if one.file is not None or one.checkpoint is None:
        return one.file
    if isinstance(one.checkpoint, AnyModel) or one.checkpoint.kind == "huggingface":
        return one.checkpoint.path
    if not r.compare.speed or one.checkpoint.architecture.model_type is None:
        return None
    asked = {"path": str(one.checkpoint.path), "cache_dir": r.data.cache_dir}
    return Path(_child("exporting", asked, one.name))


def _timed(r: CompareRecipe, prepared: Prepared, weights: dict[str, Path | None]) -> dict[str, Speed]:
    """Each model once a round, so that what else the machine does meets all of them."""
    c = r.compare
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(c.rounds):
        for one in prepared.contenders:
            path = weights[one.name]
            if path is None:
                continue
            asked = {
                "engine": _engine(one),
                "path": str(path),
                "prompt": one.tokens,
                "new_tokens": c.new_tokens,
                "threads": c.threads,
            }
            said = json.loads(_child("measuring", asked, one.name, OMP_NUM_THREADS=str(c.threads)))
            _say(f"round {number + 1}/{c.rounds} {one.name}: {said['tokens_per_s']:.1f} tokens/s")
            found.setdefault(one.name, []).append(said)
    return {
        one.name: Speed(
            _engine(one),
            found[one.name][0]["device"],
            *([said[key] for said in found[one.name]] for key in ("first_s", "tokens_per_s", "memory_gib")),
        )
        for one in prepared.contenders
        if one.name in found
    }


def _engine(one: Contender) -> str:
    return "transformers" if one.file is None else "llama.cpp"


def _child(module: str, asked: dict[str, Any], name: str, **environment: str) -> str:
    """The last line that a process of this package says.

    Raises:
        FailedRun: it failed; its own words are on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"nemo_minitron.workflows.compare.{module}"],
        input=json.dumps(asked),
        env=with_package(**environment),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise FailedRun(f"{name}: {module} of {asked['path']} ended with exit code {done.returncode}")
    return done.stdout.strip().splitlines()[-1]


def _model(
    r: CompareRecipe, one: Contender, evaluation: Evaluation, weights: Path | None, speeds: dict[str, Speed]
) -> Model:
    parameters, non_embedding = _parameters(one, evaluation)
    return Model(
        name=one.name,
        evaluation=evaluation,
        parameters=parameters,
        non_embedding=non_embedding,
        training=training_of(one.source if one.evaluation is not None else one.given, r.data),
        bytes=None if weights is None else _bytes(weights),
        speed=speeds.get(one.name),
    )


def _parameters(one: Contender, evaluation: Evaluation) -> tuple[int | None, int | None]:
    found = one.checkpoint
    if isinstance(found, Source):
        return found.architecture.parameters(), found.architecture.non_embedding_parameters()
    if isinstance(found, AnyModel):
        return found.parameters, found.non_embedding_parameters
    both = (evaluation.number("params"), evaluation.number("non_embedding_params"))
    first, second = (None if value is None else int(value) for value in both)
    return first, second


def _bytes(weights: Path) -> int:
    files = [weights] if weights.is_file() else weights.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _table(r: CompareRecipe, prepared: Prepared, models: list[Model], directory: Path) -> table.Table:
    c = r.compare
    (baseline,) = (model for model in models if model.name == prepared.baseline)
    text, said = rows.text_rows(models, baseline)
    gone = [one for one in prepared.contenders if one.checkpoint is None]
    said += [f"{one.name}: its model is no longer at {one.source}; no speed" for one in gone]
    how = (
        f"Speed and memory: one answer of {c.new_tokens} tokens after a prompt of {c.prompt_tokens}, without an end "
        f"token; {c.threads} thread(s); median of {c.rounds} round(s), the models in turns, each in a process of its "
        "own. Memory: the peak above what the process had before the model was loaded. transformers computes in "
        "float32 on the CPU, in the weights' dtype with CUDA."
    )
    return table.Table(
        models=models,
        baseline=baseline.name,
        scores=rows.score_rows(models, baseline),
        text=text,
        said=said,
        command=_command(directory),
        machine=_machine(),
        how=how,
        published=c.published,
    )


def _command(directory: Path) -> str:
    """As the user typed it."""
    first = (directory / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ")


def _machine() -> str:
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"Machine: {name}, {len(os.sched_getaffinity(0))} cores."


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fields(found: table.Table, directory: Path, *, drawn: bool) -> dict[str, Any]:
    measured = {
        model.name: {
            "evaluation": str(model.evaluation.directory.resolve()),
            **{name: value for name, value, _ in table.sizes_of(model)},
            "left_out": model.training.left_out,
            "speed": None if model.speed is None else vars(model.speed),
            "measures": {
                row.name: {
                    "value": cell.value,
                    "stderr": cell.stderr,
                    "items": cell.items,
                    "at_chance": cell.at_chance,
                    "difference": None if cell.difference is None else vars(cell.difference),
                }
                for row in (*found.scores, *found.text)
                if (cell := row.cells.get(model.name)) is not None
            },
        }
        for model in found.models
    }
    return {
        "recipe": "compare",
        "baseline": found.baseline,
        "models": measured,
        "left_out": found.said,
        "table": str((directory / MARKDOWN).resolve()),
        "picture": str((directory / PICTURE).resolve()) if drawn else None,
        "peak_rss_gib": peak_rss_gib(),
    }
