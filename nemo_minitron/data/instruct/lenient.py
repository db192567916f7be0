"""The lenient score: whether a careful reader would call an answer right that has not the set's own short form.

says          `text`, perhaps `opening`, `others`, `pool`, `most`: the answer begins with the opening, says the text in
              at most so many words (40), and nothing against it: no negation, none of `others`, no other number, no
              list of guesses
says_unknown  `others`, perhaps `pool`: it says that the text does not tell, and none of `others`
writes        `text`, perhaps `case`: it writes that, in any spacing, perhaps after an introduction or inside quotes
writes_often  `text`, `count`: that word so often, with any punctuation between
gives_call    `name`, `arguments`: a JSON object that calls so, perhaps in a code fence or with words around it

These decide on phrases of everyday English; a made-up sentence can mislead them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MOST_WORDS = 40
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})
# Words with a negation in them that negate nothing.
_HARMLESS = re.compile(
    r"\bno (?:doubt|problem|worries)\b|\bwithout (?:a |any )?doubt\b|\bnot only\b|\bno\.? ?(?=\d)|\bof course\b"
)
_NEGATION = re.compile(
    r"\b(?:not|no|nope|never|none|neither|nor|cannot|without"
    r"|except|unlike|hardly|wrong|false"
    r"|incorrect|untrue|opposite|unknown|instead|rather|doubt|near|left|former|formerly)\b|n't\b|\b(?:any\w*"
    r"|every\w*|all) but\b|\bother than\b|\bused to be\b"
)
# The passage itself, where "text" is also a word that is asked for.
_THE_TEXT = re.compile(
    r"\b(?:from|in|to|by) the text\b|\bthe text (?=says|does|doesn't|has no|mentions|tells)"
)
# A number that is only near to the one that is said.
_NEAR = re.compile(
    r"\b(?:more|less|fewer|greater|larger|smaller|bigger|higher|lower) than\b|\b(?:almost|nearly|below|above|at least"
    r"|at most|plus|minus|times)\b"
)
_UNKNOWN = re.compile(
    r"\b(?:unknown|undefined|unspecified|unclear|unstated)\b"
    r"|(?:\bnot|n't|\bnever) (?:\w+ ){0,2}(?:say|tell|state|mention|give|know|specify|specified|contain|list|provide|"
    r"include|there|in the|found|present|available|clear|named|an answer|answer|sure|have)\w*"
    r"|\b(?:cannot|can't|not) (?:\w+ )?(?:be )?(?:tell|say|know|answer|determine|found|find|told|said)\w*"
    r"|\b(?:no one|nobody) (?:knows|can)\b|\bno (?:\w+ )?(?:information|mention|answer|code|number|fact|data"
    r"|idea|such|record|detail|town|home|clue)\w*"
    r"|\bnothing (?:\w+ )?(?:about|on|in|is)\b|\bmissing\b"
)
_KNOWN = re.compile(r"(?:\bnot|n't|\bnever|\bnothing(?: is)?|\bno longer|\bbut) (?:\w+ )?unknown\b")
_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SPELT = re.compile(rf"\b(?:({'|'.join(_TENS)})(?:[- ]({'|'.join(_UNITS[1:10])}))?|({'|'.join(_UNITS)}))\b")
# A sign belongs to a number where no letter, digit or colon is before it: "-45", not "code-45".
_NUMBER = re.compile(r"(?<![\w:])-?\d+(?:[.,]\d+)*%?|\d+(?:[.,]\d+)*%?")
_POLITE = (
    r"(?:yes|sure thing|sure|certainly|of course|ok|okay|well|please|indeed|clearly|absolutely|alright|thanks"
    r"|thank you|right|hi"
    r"|hello|great|got it|here)"
)
# Three words and more without one of these are a list.
_SENTENCE = re.compile(
    r"\b(?:an?|the|is|are|was|am|be|in|from|of|to|as|by|at|for|it|i|my|me|you|your|he|she|her|his|they|that|this|here"
    r"|there|has|have|had|lives?|says?|with|just)\b|'[sm]\b"
)
# What may stand beside an answer as a part of its own.
_BESIDE = re.compile(
    rf"\b(?:{_POLITE}|according there|italy|france|england|uk|norway|peru|germany|portugal|egypt|india|sir"
    rf"|madam|then|too)\b"
)
_INTRODUCTION = re.compile(
    rf"^(?:{_POLITE}[,.!]? +)*(?:{_POLITE}[,.!]? *\n|{_POLITE}[!.]? +|{_POLITE}, +|it(?: i|')s "
    rf"|(?P<said>[^:\n]{{2,80}}):\s)(?=\S)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```(?:\w+\n|\n)?(.*?)\n?```", re.DOTALL)
_QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("**", "**"))


def says(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether it says `text`, once or twice, and nothing that contradicts it."""
    text, others = _plain(check["text"]), [_plain(other) for other in check.get("others", ())]
    said, opening = _plain(answer), _plain(check.get("opening", ""))
    if not said.startswith(opening):
        return False
    said = _spelt_out(_THE_TEXT.sub("there ", said.removeprefix(opening)).strip())
    if not 0 < len(said.split()) <= check.get("most", _MOST_WORDS) or not 1 <= len(_found(said, text)) <= 2:
        return False
    if any(_found(said, other) for other in others if other != text) or _negated(said):
        return False
    if text.isdigit():
        return _only_number(said, text)
    return not _guesses(said, text, [_plain(word) for word in check.get("pool", ())])


def says_unknown(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether it says that there is no answer, and names none."""
    said = _THE_TEXT.sub("there ", _plain(answer))
    if len(said.split()) > _MOST_WORDS or any(_found(said, _plain(other)) for other in check["others"]):
        return False
    if _KNOWN.search(said) or _numbers(said) or _guesses(said, "unknown", check.get("pool", ())):
        return False
    return _UNKNOWN.search(said) is not None


def writes(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether it writes `text`; case counts where `case` says so, spaces do not beyond telling words apart."""
    fold: Callable[[str], str] = str if check.get("case") else str.casefold
    wanted = fold("".join(check["text"].split()))
    stops = ("", ".", "!") if wanted[-1:].isalnum() else ("",)
    return any("".join(fold(form).split()) == wanted + stop for form in _forms(answer) for stop in stops)


def _repeats(answer: str, check: Mapping[str, Any]) -> bool:
    wanted = [check["text"].casefold()] * check["count"]
    listed = re.sub(r"^\s*(?:\d+[.)]|[-*])\s+", "", answer.casefold(), flags=re.MULTILINE)
    return any(re.findall(r"[^\s,;.!\-\"']+", form) == wanted for form in _forms(listed))


def gives_call(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether the one JSON object in it calls `name` with `arguments`."""
    fence = _FENCE.findall(answer)
    if len(fence) > 1:
        return False
    call, around = _one_object(fence[0] if fence else answer)
    around += _FENCE.sub("", answer) if fence else ""
    if call is None or "{" in around or _negated(_plain(around)) or re.search(r"\bor\b", around):
        return False
    for key in ("function", "tool_call", "call"):
        if isinstance(call.get(key), dict) and set(call) <= {key, "type", "id"}:
            call = call[key]
    return _calls(call, check)


def _calls(call: Mapping[str, Any], check: Mapping[str, Any]) -> bool:
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # as OpenAI's interface writes them
        arguments, rest = _one_object(arguments)
        if rest.strip():
            return False
    keys = set(call) - {"type", "id"}
    return (
        keys in ({"name", "arguments"}, {"name", "parameters"})
        and call["name"] == check["name"]
        and _equal(arguments, check["arguments"])
    )


def _one_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """The first JSON object in a text, and what is around it; None where there is none or a key comes twice."""
    begin = text.find("{")
    if begin < 0:
        return None, text
    try:
        found, length = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode(text[begin:])
    except (ValueError, RecursionError):
        return None, text
    return found, text[:begin] + text[begin + length :]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`.

    Raises:
        ValueError: a key comes twice; which one counts is not defined (RFC 8259, 4).
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _equal(a: Any, b: Any) -> bool:
    """JSON's equality: 3 is 3.0, and 1 is not true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _plain(text: str) -> str:
    return " ".join(
        re.sub(r"[*`_#]+(?=\w)|(?<=\w)[*`_#]+(?!\w)", "", text.translate(_APOSTROPHES)).casefold().split()
    )


def _found(said: str, text: str) -> list[str]:
    return re.findall(rf"(?<!\w){re.escape(text)}(?!\w)", said)


def _negated(said: str) -> bool:
    return _NEGATION.search(_HARMLESS.sub(" ", said)) is not None


def _spelt_out(said: str) -> str:
    """Numbers below 100 in digits; "one" stays, since it is a pronoun more often."""

    def digits(match: re.Match[str]) -> str:
        ten, unit, alone = match.groups()
        if alone:
            return alone if alone == "one" else str(_UNITS.index(alone))
        return str(10 * (_TENS.index(ten) + 2) + (_UNITS.index(unit) if unit else 0))

    return _SPELT.sub(digits, said)


def _numbers(said: str) -> list[str]:
    return _NUMBER.findall(said)


def _only_number(said: str, text: str) -> bool:
    return (
        set(_numbers(said)) == {text}
        and not _NEAR.search(said)
        and not re.search(r"\bor\b|hundred|thousand", said)
    )


def _guesses(said: str, text: str, pool: Sequence[str]) -> bool:
    """Whether the text is one of several that are offered: joined by "or", beside a word of the pool, in a list."""
    row = text != "unknown" and len(re.findall(r"[\w']+", said)) > 2 and not _SENTENCE.search(said)
    if row or re.search(r"\b(?:or|either)\b|/", said):
        return True
    joint = r"[\s,;.&?!|-]*(?:\b(?:and|also|then|maybe|perhaps)\b)?[\s,;.&?!|-]*"
    beside = "|".join(re.escape(word) for word in pool if word != text)
    own = re.escape(text)
    # "It is file. It is time." also says the second.
    if beside and re.search(rf"(?:\bis|'s|\bbe) (?:an? |the )?(?:{beside})(?!\w| is| of|'s)", said):
        return True
    if beside and re.search(rf"\b{own}\b{joint}\b(?:{beside})\b|\b(?:{beside})\b{joint}\b{own}\b", said):
        return True
    parts = [
        re.sub(r"^(?:an?|the|one|in|from)\b", "", part.strip(" .!?")).split()
        for part in re.split(r"[,;|]|\band\b", _BESIDE.sub("", said))
    ]
    # "Rome, Madrid" offers two; "I am Leo, the baker" does not.
    return [text] in parts and any(len(part) == 1 and part != [text] for part in parts)


def _forms(answer: str) -> list[str]:
    """The answer, what is after its introduction, inside its code fence, inside its quotes."""
    forms = [answer.translate(_APOSTROPHES).strip()]
    introduced = _INTRODUCTION.match(forms[0])
    if introduced and not _negated(_plain(introduced["said"] or "")):
        forms.append(forms[0][introduced.end() :].strip())
    fenced = [_FENCE.fullmatch(form) for form in forms]
    forms += [match[1].strip() for match in fenced if match]
    for left, right in _QUOTES:
        forms += [
            form.removesuffix(".")[len(left) : -len(right)]
            for form in forms
            if len(form) > len(left + right)
            and form.startswith(left)
            and form.removesuffix(".").endswith(right)
        ]
    return forms


KINDS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "says": says,
    "says_unknown": says_unknown,
    "writes": writes,
    "writes_often": _repeats,
    "gives_call": gives_call,
}
