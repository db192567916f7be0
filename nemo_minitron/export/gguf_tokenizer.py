"""A Hugging Face tokenizer as a GGUF file's metadata.

llama.cpp splits text by rules of its own that a file only names: a byte-level BPE is written where one of the names
means its regular expression, a SentencePiece BPE (Llama 2, Mistral, Gemma) with scores that give its merges' order, and
any other tokenizer is refused. The reverse of `checkpoints.gguf.tokenizer`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.checkpoints.gguf.pre_tokenizers import name_of
from nemo_minitron.errors import InputError
from nemo_minitron.export.generation import ids_of

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
# llama.cpp ends a text at any of the three.
STOPS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokenizer.

    Attributes:
        model: "gpt2", a byte-level BPE, or "llama", SentencePiece's.
        pre: the name of the split; "default" for "llama".
        texts, types: by id, for each row of the embeddings.
        merges: of "gpt2"; scores: of "llama".
        ids: by llama.cpp's role.
        stops_left_out: stop tokens that the file has no role for.
        flags: add_bos_token, add_eos_token, add_space_prefix.
        template: the chat template.
    """

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: Mapping[str, int]
    stops_left_out: list[int]
    flags: Mapping[str, bool]
    template: str | None

    def add(self, writer: Any) -> None:
        """Hand it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, number in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(number)
        for name, value in self.flags.items():
            getattr(writer, f"add_{name}")(value)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, settings: Mapping[str, Any], rows: int, where: str) -> Vocabulary:
    """The metadata of a tokenizer.

    Args:
        tokenizer: Hugging Face's.
        settings: of generation_config.json: its ids are the file's.
        rows: of the embeddings; those without a token are filled up.
        where: what a refusal begins with.

    Raises:
        InputError: a kind of tokenizer that llama.cpp does not have, or a split that it has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{where}: a slow tokenizer; format=gguf needs a tokenizer.json")
    rules = json.loads(backend.to_str())
    kind = rules["model"].get("type")
    if kind != "BPE":
        raise InputError(f"{where}: a {kind} tokenizer; format=gguf has byte-level and SentencePiece BPE")
    texts, types = _tokens(rules, rows)
    ids, left_out = _ids(settings, tokenizer)
    common: dict[str, Any] = {"texts": texts, "types": types, "ids": ids, "stops_left_out": left_out}
    common["template"] = tokenizer.chat_template or None
    flags = _flags(tokenizer)
    if rules["model"].get("byte_fallback"):
        prefix = _space_prefix(rules, where)
        scores = _scores(rules["model"], texts, types)
        flags = {**flags, "add_space_prefix": prefix}
        return Vocabulary("llama", "default", merges=[], scores=scores, flags=flags, **common)
    pre = _pre(rules, where)
    merges = [" ".join(_pair(merge)) for merge in rules["model"]["merges"]]
    return Vocabulary("gpt2", pre, merges=merges, scores=[], flags=flags, **common)


def _pre(rules: Mapping[str, Any], where: str) -> str:
    normalizer = rules.get("normalizer")
    # Of text that is in this form already, as nearly all is, it changes nothing; llama.cpp has no step for it.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise InputError(
            f"{where}: the tokenizer's normalizer {normalizer.get('type')} is none of llama.cpp's"
        )
    if (pre := name_of(rules)) is None:
        steps = json.dumps(rules.get("pre_tokenizer"))[:200]
        raise InputError(f"{where}: llama.cpp knows no pre-tokenizer like {steps}")
    return pre


def _pair(merge: Any) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _tokens(rules: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    by_id = {number: text for text, number in rules["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, _NORMAL)
    if rules["model"].get("byte_fallback"):
        is_byte = {number for number, text in by_id.items() if len(text) == 6 and text[:3] == "<0x"}
        types |= dict.fromkeys(is_byte, _BYTE)
    for token in rules["added_tokens"]:
        by_id[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token["special"] else _USER
    unknown = rules["model"].get("unk_token")
    types |= {number: _UNKNOWN for number, text in by_id.items() if text == unknown}
    return (
        [by_id.get(number, f"[PAD{number}]") for number in range(rows)],
        [types.get(number, _UNUSED) for number in range(rows)],
    )


def _ids(settings: Mapping[str, Any], tokenizer: Any) -> tuple[dict[str, int], list[int]]:
    """Ids by role; stop tokens in their order, and those beyond the third."""
    stops = ids_of(settings, "eos_token_id", "generation settings")
    found = dict(zip(STOPS, stops, strict=False))
    for role, number in (
        ("bos", next(iter(ids_of(settings, "bos_token_id", "generation settings")), None)),
        ("pad", next(iter(ids_of(settings, "pad_token_id", "generation settings")), None)),
        ("unk", tokenizer.unk_token_id),
    ):
        if number is not None:
            found[role] = number
    return found, stops[len(STOPS) :]


def _flags(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets a token before or after it."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    begin = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return {"add_bos_token": begin > 0, "add_eos_token": len(whole) > begin + len(plain)}


def _space_prefix(rules: Mapping[str, Any], where: str) -> bool:
    """Whether a text begins with a space, by the steps that transformers' converter writes.

    Raises:
        InputError: other steps.
    """
    normalizer, pre = rules.get("normalizer") or {}, rules.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE} in steps
    if replaces and kinds in (["Replace"], ["Prepend", "Replace"]) and pre.get("type") in (None, "Split"):
        return kinds[0] == "Prepend"
    if not steps and pre.get("type") == "Metaspace" and pre.get("replacement") == _SPACE:
        return pre.get("prepend_scheme") != "never"
    raise InputError(
        f"{where}: a SentencePiece tokenizer with the steps {kinds or pre.get('type')}: is not written"
    )


def _scores(model: Mapping[str, Any], texts: list[str], types: list[int]) -> list[float]:
    """Scores that let llama.cpp merge in the merges' order: a piece's is minus the place of its first merge."""
    place: dict[str, int] = {}
    for number, merge in enumerate(model["merges"]):
        place.setdefault("".join(_pair(merge)), number)
    last = len(model["merges"])
    # Pieces that nothing is merged to: single characters, bytes and control tokens.
    return [
        -float(place.get(text, last)) if kind == _NORMAL else 0.0
        for text, kind in zip(texts, types, strict=True)
    ]
