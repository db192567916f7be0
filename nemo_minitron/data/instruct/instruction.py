"""Instructions with constraints that a program can check: how often, how it begins and ends, what must not be there."""

import random

from nemo_minitron.data.instruct.template_families import WORDS, Draft, Skill, user

_CATEGORY = "instruction"
_ENDS = ("!", "?", ";", "...", ":", "+")
_AROUND = (("(", ")"), ("[", "]"), ("<", ">"), ("*", "*"), ("{", "}"))
_BETWEEN = ("-", "_", "/", "+", ".")


def _repeat(rng: random.Random, wording: str) -> Draft:
    word, count = rng.choice(WORDS), rng.randint(2, 4)
    wrong = [" ".join([word] * n) for n in (1, 2, 3, 4, 5) if n != count]
    return Draft(
        [user(wording.format(word=word, n=count))],
        " ".join([word] * count),
        [{"kind": "contains", "text": word}, {"kind": "repeats", "text": word, "count": count}],
        wrong,
        [{"kind": "writes_often", "text": word, "count": count}],
    )


def _end(rng: random.Random, wording: str) -> Draft:
    word, mark = rng.choice(WORDS), rng.choice(_ENDS)
    other = rng.choice([m for m in _ENDS if not m.endswith(mark)])
    return Draft(
        [user(wording.format(word=word, mark=mark))],
        word + mark,
        [
            {"kind": "starts_with", "text": word},
            {"kind": "ends_with", "text": mark},
            {"kind": "is", "texts": [word + mark]},
        ],
        [word, word + other, mark],
        [{"kind": "writes", "text": word + mark}],
    )


def _around(rng: random.Random, wording: str) -> Draft:
    word, (left, right) = rng.choice(WORDS), rng.choice(_AROUND)
    other = rng.choice([pair for pair in _AROUND if pair[0] != left])
    return Draft(
        [user(wording.format(word=word, left=left, right=right))],
        f"{left}{word}{right}",
        [
            {"kind": "starts_with", "text": left},
            {"kind": "contains", "text": word},
            {"kind": "ends_with", "text": right},
            {"kind": "is", "texts": [f"{left}{word}{right}"]},
        ],
        [word, f"{other[0]}{word}{other[1]}", f"{left}{word}", f"{left}{right}"],
        [{"kind": "writes", "text": f"{left}{word}{right}"}],
    )


def _join(rng: random.Random, wording: str) -> Draft:
    words, mark = rng.sample(WORDS, 3), rng.choice(_BETWEEN)
    a, b, c = words
    other = rng.choice([m for m in _BETWEEN if m != mark])
    return Draft(
        [user(wording.format(a=a, b=b, c=c, mark=mark))],
        mark.join(words),
        [
            {"kind": "starts_with", "text": a},
            {"kind": "ends_with", "text": c},
            {"kind": "is", "texts": [mark.join(words)]},
        ],
        [other.join(words), f"{a} {b} {c}", mark.join([a, b]), mark.join([c, b, a])],
        [{"kind": "writes", "text": mark.join(words)}],
    )


def _upper(rng: random.Random, wording: str) -> Draft:
    word = rng.choice(WORDS)
    return Draft(
        [user(wording.format(word=word))],
        word.upper(),
        [{"kind": "upper"}, {"kind": "contains", "text": word}, {"kind": "is", "texts": [word]}],
        [word, word.capitalize(), word.upper() * 2],
        [{"kind": "writes", "text": word.upper(), "case": True}],
    )


def _avoid(rng: random.Random, wording: str) -> Draft:
    wanted, other = rng.sample(WORDS, 2)
    a, b = rng.sample([wanted, other], 2)
    return Draft(
        [user(wording.format(a=a, b=b, other=other))],
        wanted,
        [
            {"kind": "contains", "text": wanted},
            {"kind": "lacks", "texts": [other]},
            {"kind": "is", "texts": [wanted]},
        ],
        [other, f"{a} {b}", rng.choice([w for w in WORDS if w not in (wanted, other)])],
        [{"kind": "says", "text": wanted, "others": [other], "pool": list(WORDS), "most": 12}],
    )


SKILLS = [
    Skill(
        _CATEGORY,
        "repeat",
        {
            "train": [
                "Write the word {word} {n} times.",
                "Say {word} {n} times.",
                "Repeat {word} {n} times.",
                "Print {word} {n} times in one line.",
                "I want the word {word}, {n} times.",
                "Give me {n} times the word {word}.",
                "Return {word}, and do it {n} times.",
                "{n} times in one line: {word}",
            ],
            "valid": ["Please print the word {word} {n} times."],
            "test": ["Say the word {word} for me, {n} times.", "Write {n} times {word}, in one line."],
        },
        _repeat,
    ),
    Skill(
        _CATEGORY,
        "end",
        {
            "train": [
                "Write the word {word} and end with {mark}",
                "Say {word} and put {mark} at the end.",
                "Print {word}. The last thing must be {mark}",
                "End the word {word} with {mark}",
                "Add {mark} to the end of {word}",
                "Write {word}, then {mark}",
                "Return {word} with {mark} after it.",
            ],
            "valid": ["Put {mark} after the word {word}"],
            "test": ["Say the word {word} with {mark} at the end.", "Print {word} and end it with {mark}"],
        },
        _end,
    ),
    Skill(
        _CATEGORY,
        "around",
        {
            "train": [
                "Write {word} between {left} and {right}",
                "Put {word} inside of {left} and {right}",
                "Start with {left} then write {word} and end with {right}",
                "Print the word {word} with {left} before and {right} after it.",
                "Return {word} between {left} and {right}",
                "Say {word} in {left} {right}",
                "Set {left} and {right} around {word}",
            ],
            "valid": ["Write the word {word} inside of {left} {right}"],
            "test": [
                "Print {word} between {left} and {right}",
                "Put {left} before and {right} after the word {word}",
            ],
        },
        _around,
    ),
    Skill(
        _CATEGORY,
        "join",
        {
            "train": [
                "Join {a}, {b} and {c} with {mark}",
                "Write {a}, {b} and {c} with {mark} between them.",
                "Put {mark} between {a}, {b} and {c}",
                "Use {mark} to join the words {a}, {b} and {c}",
                "Print {a} {b} {c}, but with {mark} between the words.",
                "Return {a}, {b}, {c} as one string, with {mark} between them.",
                "Make one string of {a}, {b} and {c} with {mark}",
            ],
            "valid": ["Print the words {a}, {b} and {c} with {mark} between them."],
            "test": [
                "Join the words {a} {b} {c} with {mark} between them.",
                "Use {mark} between {a}, {b} and {c}",
            ],
        },
        _join,
    ),
    Skill(
        _CATEGORY,
        "upper",
        {
            "train": [
                "Write {word} in upper case.",
                "Print the word {word} in upper case.",
                "Make {word} upper case.",
                "Use upper case for {word}",
                "Return {word}, all in upper case.",
                "Upper case, please: {word}",
            ],
            "valid": ["Say {word} in upper case."],
            "test": ["Write the word {word}, but in upper case.", "Please make the word {word} upper case."],
        },
        _upper,
    ),
    Skill(
        _CATEGORY,
        "avoid",
        {
            "train": [
                "Say {a} or {b}, but not {other}.",
                "Write one of {a} and {b}, and not {other}.",
                "Do not say {other}. Say {a} or {b}.",
                "Print {a} or {b}. It must not be {other}.",
                "{a} or {b}? Not {other}.",
                "Not {other}: choose from {a} and {b}.",
                "Return one of {a}, {b}. Do not return {other}.",
            ],
            "valid": ["Choose {a} or {b}, but not {other}."],
            "test": ["Print one of {a} and {b}, but not {other}.", "Write {a} or {b}. Do not write {other}."],
        },
        _avoid,
    ),
]
