"""Which files are damaged, and who reads them."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import files
from tests.fuzz.places import CACHED, Places


@dataclass(frozen=True)
class Target:
    """A file of one directory, the recipes that read it, and how one names the directory.

    `recipes`: also a reader of the package, which gets the file itself. `weight`: how often it is drawn, beside others.
    """

    file: str
    recipes: tuple[str, ...]
    kind: str
    of: str = "hf"
    key: str | None = None
    weight: int = 1

    @property
    def family(self) -> str:
        """As `--of` has it."""
        names = {
            "scores.safetensors": "scores",
            "plan.json": "plan",
            "model.gguf": "gguf",
            "merge.yaml": "merge",
        }
        if self.file in names:
            return names[self.file]
        if self.of in ("hf", "nemo"):
            return "template" if self.kind == "template" else "checkpoint"
        if self.of == "cached":
            return "cache"
        conversations = ("conversations.jsonl", "preferences-valid.jsonl", "instruct.jsonl")
        return (
            "conversations" if self.file in conversations else "task" if self.file == "task.jsonl" else "text"
        )


MODEL = ("prune", "search", "distill", "synthesize", "sft", "evaluate_instruct", "export", "chat")
TARGETS = [
    Target("config.json", MODEL, "json", weight=2),
    Target("generation_config.json", MODEL, "json"),
    Target("model.safetensors", MODEL, "safetensors", weight=2),
    Target("model.safetensors.index.json", MODEL, "index"),
    Target("tokenizer.json", MODEL, "json"),
    Target("tokenizer_config.json", MODEL, "json"),
    Target("special_tokens_map.json", MODEL, "json"),
    Target(
        "tokenizer_config.json",
        ("sft", "preference", "evaluate_instruct", "instruct_data"),
        "template",
        weight=2,
    ),
    Target("context/model.yaml", MODEL, "yaml", "nemo", weight=2),
    Target("context/io.json", MODEL, "json", "nemo"),
    Target("weights/metadata.json", MODEL, "json", "nemo"),
    Target("weights/.metadata", MODEL, "pickle", "nemo"),
    Target("weights/common.pt", MODEL, "pickle", "nemo"),
    Target("scores.safetensors", ("prune", "search"), "safetensors", "", "prune.scores", weight=2),
    Target("task.jsonl", ("prune",), "jsonl", "", "prune.task_file"),
    Target("conversations.jsonl", ("sft",), "jsonl", "", "align.train"),
    Target("conversations.jsonl", ("instruct_data",), "jsonl", "", "instruct_data.input"),
    Target("preferences-valid.jsonl", ("preference",), "jsonl", "", "align.valid"),
    Target("instruct.jsonl", ("evaluate_instruct",), "jsonl", "", "instruct.file"),
    Target("prompts.jsonl", ("synthesize",), "jsonl", "", "synthesize.prompts"),
    Target("corpus.jsonl", ("prune", "pretrain"), "jsonl", "", "data.train"),
    Target("valid.txt", ("prune", "pretrain"), "bytes", "", "data.valid"),
    Target("text/train.jsonl", ("distill",), "jsonl", "sdg", "sdg"),
    Target("result.json", ("distill",), "json", "sdg", "sdg"),
    Target("cache/manifest.json", ("distill",), "json", "cached", "teacher_cache", weight=2),
    Target("cache/head.safetensors", ("distill",), "safetensors", "cached", "teacher_cache"),
    Target("cache/shard-000000.safetensors", ("distill",), "safetensors", "cached", "teacher_cache"),
    Target("plan.json", ("distill",), "json", "run", "student"),
    Target("plan.json", ("PrunePlan.load",), "json", "", weight=2),
    Target("model.gguf", MODEL, "gguf", "", "model", weight=2),
    Target("merge.yaml", ("merge",), "yaml", "", "merge.file"),
]
FAMILIES = sorted({target.family for target in TARGETS})


def mutate(
    rng: random.Random, places: Places, place: Path, family: str | None = None
) -> tuple[str, list[str], str]:
    """Make a copy in `place` with one file changed, of one family if it is given.

    Returns:
        The recipe, its overrides, and what was done, in words.
    """
    target = rng.choice([t for t in TARGETS if family in (None, t.family) for _ in range(t.weight)])
    recipe = rng.choice(target.recipes)
    copy = _copied(target, places, place)
    if target.kind == "index":
        (copy / "model.safetensors").rename(copy / "part.safetensors")
        entries = {"weight_map": {"model.norm.weight": "part.safetensors"}, "metadata": {}}
        (copy / target.file).write_text(json.dumps(entries))
    if not (copy / target.file).exists():
        candidates = [path.name for path in (copy / target.file).parent.glob("*")]
        raise AssertionError(f"{target.file} is not in the original: {candidates}")
    done = files.change(rng, target.kind, copy / target.file)
    return recipe, _overrides(rng, places, target, recipe, copy), f"{target.of or '.'}/{target.file}: {done}"


def _copied(target: Target, places: Places, place: Path) -> Path:
    """A directory with the file in it, in an empty one."""
    shutil.rmtree(place, ignore_errors=True)
    copy = place / "damaged"
    if target.of:
        shutil.copytree(places.home / target.of, copy, symlinks=True)
    else:
        copy.mkdir(parents=True)
        shutil.copy(places.home / target.file, copy / target.file)
    return copy


def undamaged(places: Places, place: Path) -> Iterator[tuple[str, list[str]]]:
    """Each recipe with each file as it is: it has to be accepted, lest a damaged one be refused for another reason."""
    for target in TARGETS:
        for recipe in target.recipes if target.kind not in ("index", "template") else ():
            if target.key != "student":
                copy = _copied(target, places, place)
                yield recipe, _overrides(random.Random(0), places, target, recipe, copy)


def _overrides(rng: random.Random, places: Places, target: Target, recipe: str, copy: Path) -> list[str]:
    """What a user says to have the damaged copy read."""
    named = copy if target.of else copy / target.file
    if recipe == "PrunePlan.load":
        return [str(named)]
    if target.kind == "template" and recipe == "instruct_data":
        return [*places.base(recipe), f"instruct_data.tokenizer={copy}"]
    if target.key in (None, "model"):
        return places.base(recipe, named)
    model = places.huggingface if target.key == "prune.scores" else None  # whose scores they are
    base = [
        text for text in places.base(recipe, model) if target.key != "merge.file" or "models=" not in text
    ]
    overrides = [*base, f"{target.key}={named}"]
    if target.key == "teacher_cache":
        overrides += [*CACHED, f"verify_cache={rng.choice(['true', 'false'])}"]
    # Of two layers: the student's map is refused, and its plan says what they were called.
    more = {
        "sdg": ["distill=sdg"],
        "data.train": ["data.text_key=text"],
        "synthesize.prompts": ["synthesize.prompt_key=prompt"],
        "student": ["distill.intermediate.layers={1:7}"],
    }
    return [*overrides, *more.get(target.key or "", [])]
