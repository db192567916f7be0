"""Role-play: the system says who the assistant is and what it always says first; the user asks about it."""

import random
from dataclasses import dataclass

from nemo_minitron.data.instruct.template_families import NAMES, TOWNS, Draft, Skill, assistant, system, user

_CATEGORY = "persona"
# fmt: off
_JOBS = (
    "writer", "reader", "printer", "driver", "painter", "farmer", "baker", "singer", "doctor", "pilot",
    "sailor", "teacher", "coder",
)
# fmt: on
_MARKERS = ("Hey!", "Yo!", "Oh!", "Ha!", "Arr!", "Hm.", "Ah!", "So:")
_ANSWERS = {"name": "I am {}.", "job": "I am a {}.", "town": "I come from {}."}
# How else the strict score lets it be said.
_FORMS = {
    "name": ("I'm {}", "My name is {}", "{}"),
    "job": ("I'm a {}", "I am the {}", "A {}", "{}"),
    "town": ("I am from {}", "I'm from {}", "I live in {}", "{}"),
}


@dataclass(frozen=True)
class _Wording:
    system: str
    name: str
    job: str
    town: str


def _draft(rng: random.Random, wording: _Wording, turns: int) -> Draft:
    facts = {"name": rng.choice(NAMES), "job": rng.choice(_JOBS), "town": rng.choice(TOWNS)}
    marker = rng.choice(_MARKERS)
    *before, asked = rng.sample(list(facts), turns)
    said = {key: f"{marker} {_ANSWERS[key].format(value)}" for key, value in facts.items()}
    messages = [system(wording.system.format(marker=marker, **facts))]
    for key in before:
        messages += [user(getattr(wording, key)), assistant(said[key])]
    messages.append(user(getattr(wording, asked)))
    others = {
        "name": [n for n in NAMES if n != facts["name"]],
        "job": [j for j in _JOBS if j != facts["job"]],
        "town": [t for t in TOWNS if t != facts["town"]],
    }
    plain = _ANSWERS[asked].format(facts[asked])
    wrong_fact = _ANSWERS[asked].format(rng.choice(others[asked]))
    other_marker = rng.choice([m for m in _MARKERS if m != marker])
    return Draft(
        messages,
        said[asked],
        [
            {"kind": "starts_with", "text": marker},
            {"kind": "contains", "text": facts[asked]},
            {
                "kind": "is",
                "texts": [said[asked], *(f"{marker} {f.format(facts[asked])}" for f in _FORMS[asked])],
            },
        ],
        [plain, f"{other_marker} {plain}", f"{marker} {wrong_fact}", marker],
        [{"kind": "says", "opening": marker, "text": facts[asked], "others": others[asked]}],
    )


def _one_turn(rng: random.Random, wording: _Wording) -> Draft:
    return _draft(rng, wording, 1)


def _two_turns(rng: random.Random, wording: _Wording) -> Draft:
    return _draft(rng, wording, 2)


_WORDINGS = {
    "train": [
        _Wording(
            "You are {name}, a {job} from {town}. You always say {marker} first.",
            "What is your name?",
            "What is your job?",
            "Where do you come from?",
        ),
        _Wording(
            "Your name is {name}. You are a {job} and you live in {town}. Start each answer with {marker}",
            "Who are you?",
            "What do you do?",
            "Where do you live?",
        ),
        _Wording(
            "Play {name}. {name} is a {job} from {town} and begins with {marker} each time.",
            "Tell me your name.",
            "Tell me your job.",
            "Tell me your town.",
        ),
        _Wording(
            "Say {marker} before all that you say. Name: {name}. Job: {job}. Town: {town}.",
            "Your name?",
            "Your job?",
            "Your town?",
        ),
        _Wording(
            "You play a {job} with the name {name}. Home: {town}. First word: {marker}",
            "How are you called?",
            "What work do you do?",
            "Where is your home?",
        ),
        _Wording(
            "From now on you are the {job} {name} from {town}. Begin with {marker}",
            "And you are?",
            "What are you?",
            "Where are you from?",
        ),
    ],
    "valid": [
        _Wording(
            "You are a {job}. Your name is {name}, your town is {town}. Begin each answer with {marker}",
            "What are you called?",
            "What job do you do?",
            "What is your town?",
        )
    ],
    "test": [
        _Wording(
            "Your job: {job}. You are {name} from {town}. Start with {marker} each time.",
            "Tell me, what is your name?",
            "Tell me, what is your job?",
            "Tell me, where do you come from?",
        ),
        _Wording(
            "Play the {job} {name}, who lives in {town}. The first word is always {marker}",
            "Who are you, please?",
            "What work do you do, please?",
            "Where are you from, please?",
        ),
    ],
}

SKILLS = [
    Skill(_CATEGORY, "one_turn", _WORDINGS, _one_turn),
    Skill(_CATEGORY, "two_turns", _WORDINGS, _two_turns),
]
