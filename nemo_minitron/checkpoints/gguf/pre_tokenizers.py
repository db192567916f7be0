"""The pre-tokenizers that GGUF files name: a file holds a name where tokenizer.json holds a regular expression.

Sources: llama.cpp for which names mean the same (ggml-org/llama.cpp, `src/llama-vocab.cpp`), and for the expressions
the tokenizer.json of the models that the names come from. Read both ways: a name to its rules, and rules to a name
(`name_of`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"


def _cased(suffix: str, digits: str) -> str:
    """Words that end where lower case turns into upper case."""
    return (
        rf"{_START}{_UPPER}*{_LOWER}+{suffix}|{_START}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """How text falls into pieces before the merges.

    Attributes:
        names: those that mean it; the first is written.
        split: the regular expression whose matches are the pieces; None for GPT-2's own (ByteLevel's `use_regex`).
        digits: whether each digit is a piece of its own, before anything else.
        ignore_merges: a piece that is in the vocabulary as a whole is taken as it is.
        add_bos: whether a text begins with the beginning token, where the file does not say.
    """

    names: tuple[str, ...]
    split: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def rules(self) -> list[dict[str, Any]]:
        """The steps as tokenizer.json has them under `pre_tokenizer.pretokenizers`."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.split is not None:
            steps.append(
                {"type": "Split", "pattern": {"Regex": self.split}, "behavior": "Isolated", "invert": False}
            )
        last = {"add_prefix_space": False, "trim_offsets": True, "use_regex": self.split is None}
        return [*steps, {"type": "ByteLevel", **last}]


PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2", "phi-2", "exaone4", "mellum", "modern-bert", "gigachat", "a.x-4.0")),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        digits=True,
    ),
    PreTokenizer(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "kormo", "grok-2"),
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_MARKS}|{_SPACES}",
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"),
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}",
        ignore_merges=True,
        add_bos=True,
    ),
    # As llama-bpe, but a whole piece has no right of its own.
    PreTokenizer(
        ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"),
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}",
    ),
    PreTokenizer(("tekken",), _cased("", r"\p{N}"), ignore_merges=True, add_bos=True),
    PreTokenizer(("gpt-4o", "llama4", "kanana2"), _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
)
BY_NAME: Mapping[str, PreTokenizer] = {name: entry for entry in PRE_TOKENIZERS for name in entry.names}


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """The name of the pre-tokenizer of a byte-level BPE, or None if none of the table's is the same.

    Args:
        tokenizer: the content of tokenizer.json.
    """
    wanted = _plain(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer.get("model", {}).get("ignore_merges", False))
    for entry in PRE_TOKENIZERS:
        rules = _plain({"type": "Sequence", "pretokenizers": entry.rules()})
        if rules == wanted and entry.ignore_merges == ignore_merges:
            return entry.names[0]
    return None


def _plain(rules: Any) -> list[str]:
    """A pre-tokenizer's steps, without what does not change the pieces: offsets, and a sequence around one step."""
    steps = (
        rules.get("pretokenizers")
        if isinstance(rules, Mapping) and rules.get("type") == "Sequence"
        else [rules]
    )
    return [json.dumps(_step(step), sort_keys=True) for step in steps or ()]


def _step(step: Any) -> Any:
    if not isinstance(step, Mapping):
        return step
    kept = {key: value for key, value in step.items() if key != "trim_offsets"}
    if step.get("type") == "ByteLevel":
        kept.setdefault("use_regex", True)
    return kept
