"""The project's own instruct set: seeded, in four categories, with splits by template family."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.instruct import InstructSizes as Sizes
from nemo_minitron.data.chat.conversations import Message, write_jsonl
from nemo_minitron.data.instruct import calls, instruction, passage, persona
from nemo_minitron.data.instruct.checks import share_passed
from nemo_minitron.data.instruct.template_families import Draft, Family, Skill, assistant
from nemo_minitron.errors import InputError
from nemo_minitron.files import making_once

SKILLS: list[Skill] = [*instruction.SKILLS, *persona.SKILLS, *passage.SKILLS, *calls.SKILLS]
CATEGORIES = ("instruction", "persona", "passage", "function")
# "seen": the families of "train" with other samples; what it scores above "test" is what a family's wording is worth.
SPLITS = ("train", "seen", "valid", "test")
_PATIENCE = 2000
# What the generator writes; part of the cache's key, so that another version makes other files.
_FORMAT = 3


@dataclass(frozen=True)
class InstructFiles:
    """Where the set lies: conversations (`train`, `seen`, `valid`, `test`) and preference pairs."""

    train: Path
    seen: Path
    valid: Path
    test: Path
    preference_train: Path
    preference_valid: Path

    @classmethod
    def below(cls, directory: str | Path) -> "InstructFiles":
        """The files of a directory that `write_instruct_set` has filled."""
        return cls(**{name: Path(directory) / f"{name}.jsonl" for name in cls.__dataclass_fields__})


def families(split: str) -> list[Family]:
    """The template families of a split; each belongs to train, valid or test, and "seen" has those of train.

    Raises:
        InputError: no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split={split}: must be one of {', '.join(SPLITS)}")
    own = "train" if split == "seen" else split
    return [Family(skill, own, n) for skill in SKILLS for n in range(len(skill.wordings[own]))]


def samples(split: str, per_category: int, seed: int, exclude: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Samples of a split, all with different prompts, categories in turn.

    Each has `messages` (the last is the answer), `category`, `family`, `checks` and `lenient` (see
    `data.instruct.checks`).

    Args:
        per_category: how many of each.
        exclude: prompts (`prompt_key`) that must not appear.

    Raises:
        InputError: the split's families do not have so many different prompts.
    """
    return [
        {
            "messages": [*draft.messages, assistant(draft.answer)],
            "category": family.skill.category,
            "family": family.name,
            "checks": draft.checks,
            "lenient": draft.lenient,
        }
        for family, draft, _ in _drafts(f"samples/{split}", split, per_category, seed, exclude)
    ]


def preference_pairs(split: str, per_category: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of a right answer and one that breaks at least one check. A reward is the share of checks that hold.

    Raises:
        InputError: as `samples`.
    """
    rows = []
    for family, draft, rng in _drafts(f"pairs/{split}", split, per_category, seed, ()):
        rejected = rng.choice(draft.wrong)
        rows.append(
            {
                "messages": draft.messages,
                "chosen": draft.answer,
                "rejected": rejected,
                "chosen_reward": share_passed(draft.checks, draft.answer),
                "rejected_reward": share_passed(draft.checks, rejected),
                "category": family.skill.category,
                "family": family.name,
                "checks": draft.checks,
            }
        )
    return rows


def prompt_key(messages: Iterable[Message]) -> str:
    """What tells prompts apart."""
    return json.dumps([[m["role"], m["content"]] for m in messages])


def _drafts(
    stream: str, split: str, per_category: int, seed: int, exclude: Iterable[str]
) -> list[tuple[Family, Draft, random.Random]]:
    seen = set(exclude)
    by_category = []
    for category in CATEGORIES:
        rng = random.Random(f"{seed}/{stream}/{category}")
        skills: dict[str, list[Family]] = {}
        for family in families(split):
            if family.skill.category == category:
                skills.setdefault(family.skill.name, []).append(family)
        by_category.append([_new(rng, list(skills.values()), seen, split) for _ in range(per_category)])
    return [drawn for turn in zip(*by_category, strict=True) for drawn in turn]


def _new(
    rng: random.Random, skills: list[list[Family]], seen: set[str], split: str
) -> tuple[Family, Draft, random.Random]:
    for _ in range(_PATIENCE):
        family = rng.choice(rng.choice(skills))
        draft = family.draft(rng)
        key = prompt_key(draft.messages)
        if key not in seen:
            seen.add(key)
            return family, draft, rng
    category = skills[0][0].skill.category
    raise InputError(
        f"the {split} families of {category} do not have so many different prompts; ask for fewer"
    )


def write_instruct_set(directory: str | Path, seed: int = 1234, sizes: Sizes | None = None) -> InstructFiles:
    """Generate the whole set into a directory: the same seed and sizes give the same bytes.

    No prompt of "seen", "valid" or "test" is in "train" or in a preference file.

    Raises:
        InputError: a size below 1, or more than there are different prompts.
    """
    sizes = sizes or Sizes()
    for name, size in asdict(sizes).items():
        if size < 1:
            raise InputError(f"sizes.{name}={size}: must be at least 1")
    files = InstructFiles.below(directory)
    held_out = {split: samples(split, getattr(sizes, split), seed) for split in ("seen", "valid", "test")}
    for split, rows in held_out.items():
        write_jsonl(getattr(files, split), rows)
    keys = {prompt_key(row["messages"][:-1]) for row in held_out["seen"]}
    write_jsonl(files.train, samples("train", sizes.train, seed, keys))
    for split in ("train", "valid"):
        name = f"preference_{split}"
        pairs = preference_pairs(split, getattr(sizes, name), seed)
        write_jsonl(getattr(files, name), (p for p in pairs if prompt_key(p["messages"]) not in keys))
    return files


def cached_instruct_set(cache: str | Path, seed: int = 1234, sizes: Sizes | None = None) -> InstructFiles:
    """As `write_instruct_set`, into a directory of the cache that is named by seed and sizes; made once."""
    key = json.dumps([_FORMAT, seed, asdict(sizes or Sizes())])
    final = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not final.is_dir():
        with making_once(final) as temporary:
            write_instruct_set(temporary, seed, sizes)
    return InstructFiles.below(final)
