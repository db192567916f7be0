"""The tokenizer of a GGUF file as Hugging Face's tokenizer.json and tokenizer_config.json.

Two kinds occur in the families that are read. "gpt2": a byte-level BPE with its merges, whose split of the text is
given by a name (`pre_tokenizers`). "llama": SentencePiece's BPE, whose merges follow from the scores of its pieces, as
llama.cpp takes them (`src/llama-vocab.cpp`, llm_tokenizer_spm_session) and transformers' converter writes them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.gguf.pre_tokenizers import BY_NAME
from nemo_minitron.checkpoints.gguf.settings import Settings
from nemo_minitron.errors import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
# All splits of a piece are looked at. Gemma's longest has 31 characters.
_LONGEST_PIECE = 512
_PREFIX = "tokenizer.ggml."


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
        texts: by id; None where the file only fills the table up ("[PAD7]" at 7, never used).
        types: llama.cpp's token types, by id.
        special: the ids of "bos", "eos", "unk" and "pad", those that there are.
        stops: ids that end an answer, the end-of-text token first.
        add_bos, add_eos: what a text gets.
    """

    texts: list[str | None]
    types: list[int]
    special: dict[str, int]
    stops: list[int]
    add_bos: bool
    add_eos: bool

    def by_text(self) -> dict[str, int]:
        """Ids by text."""
        return {text: number for number, text in enumerate(self.texts) if text is not None}

    def text(self, role: str) -> str | None:
        """The text of a special token."""
        return self.texts[self.special[role]] if role in self.special else None


def read_vocabulary(s: Settings, rows: int) -> Vocabulary:
    """The vocabulary of a file and its special tokens.

    Args:
        rows: of the embedding.

    Raises:
        InputError: a kind that is not read, lists that do not fit each other, an id without a token.
    """
    kind = s.text(_PREFIX + "model")
    if kind not in ("gpt2", "llama"):
        raise s.refuse(
            _PREFIX + "model", kind, "read are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE)"
        )
    texts: list[str | None] = [*s.texts(_PREFIX + "tokens")]
    if not 0 < len(texts) <= rows:
        raise s.refuse(_PREFIX + "tokens", len(texts), f"tokens, but the embedding has {rows} rows")
    types = [int(value) for value in s.numbers(_PREFIX + "token_type", len(texts), [_NORMAL] * len(texts))]
    for number, text in enumerate(texts):
        if types[number] == _UNUSED and text == f"[PAD{number}]":
            texts[number] = None
    present = [text for text in texts if text is not None]
    if len(set(present)) != len(present):
        raise InputError(f"{s.where}: {_PREFIX}tokens holds a token twice")
    special = _special(s, texts)
    pre = BY_NAME.get(s.text(_PREFIX + "pre", ""))
    add_bos = s.flag(_PREFIX + "add_bos_token", kind == "llama" or (pre is not None and pre.add_bos))
    add_eos = s.flag(_PREFIX + "add_eos_token", False)
    stops = [special[role] for role in ("eos", "eot", "eom") if role in special]
    return Vocabulary(
        texts,
        types,
        {role: special[role] for role in ("bos", "eos", "unk", "pad") if role in special},
        list(dict.fromkeys(stops)),
        add_bos and "bos" in special,
        add_eos and "eos" in special,
    )


def _special(s: Settings, texts: list[str | None]) -> dict[str, int]:
    found = {}
    for role, name in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("pad", "padding"),
        ("eot", "eot"),
        ("eom", "eom"),
    ):
        key = f"{_PREFIX}{name}_token_id"
        number = s.integer(key, None, least=0)
        if number is None:
            continue
        if number >= len(texts) or texts[number] is None:
            raise s.refuse(key, number, f"is none of the {len(texts)} tokens")
        found[role] = number
    return found


def write_tokenizer(s: Settings, vocabulary: Vocabulary, context: int, to: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        context: of the model, in tokens.

    Raises:
        InputError: a pre-tokenizer that is not known, a merge of what is no token.
    """
    from tokenizers import Tokenizer  # type: ignore

    rules = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **(
            _byte_level(s, vocabulary)
            if s.text(_PREFIX + "model") == "gpt2"
            else _sentencepiece(s, vocabulary)
        ),
        "post_processor": _post_processor(vocabulary),
    }
    text = json.dumps(rules, ensure_ascii=False)
    try:
        Tokenizer.from_str(text).encode("a b")
    except BaseException as error:  # a panic of `tokenizers` is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(f"{s.where}: its tokenizer cannot be built ({str(error)[:200]})") from None
    (to / "tokenizer.json").write_text(text)
    (to / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(s, vocabulary, context), indent=2))


def _tokenizer_config(s: Settings, vocabulary: Vocabulary, context: int) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        # Without it transformers adds token_type_ids, which no model of these families takes.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": vocabulary.text(role) for role in vocabulary.special},
    }
    template = s.text("tokenizer.chat_template", None)
    return config if template is None else {**config, "chat_template": template}


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Control tokens, and those that the user defined: found in a text before it is split."""
    named = set(vocabulary.special.values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": text, **flags, "special": kind != _USER or number in named}
        for number, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
        if text and (kind in (_CONTROL, _USER, _UNKNOWN) or number in named)
    ]


def _byte_level(s: Settings, vocabulary: Vocabulary) -> dict[str, Any]:
    name = s.text(_PREFIX + "pre", None)
    if name not in BY_NAME:
        raise s.refuse(_PREFIX + "pre", name, f"known pre-tokenizers are {', '.join(BY_NAME)}")
    pre = BY_NAME[name]
    merges = []
    for merge in s.texts(_PREFIX + "merges"):
        left, _, right = merge[1:].partition(" ")
        if not right:
            raise s.refuse(_PREFIX + "merges", merge, "must be two tokens with a space between")
        merges.append([merge[0] + left, right])
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.rules()},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **_bpe(vocabulary, merges),
            "ignore_merges": pre.ignore_merges,
        },
    }


def _bpe(vocabulary: Vocabulary, merges: list[Any]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.by_text(),
        "merges": merges,
    }


def _sentencepiece(s: Settings, vocabulary: Vocabulary) -> dict[str, Any]:
    """The form of tokenizer.json that Llama 2, Mistral and Gemma have: spaces are written as "▁", no split."""
    prefix = s.flag(_PREFIX + "add_space_prefix", True)
    if s.flag(_PREFIX + "remove_extra_whitespaces", False):
        raise s.refuse(_PREFIX + "remove_extra_whitespaces", True, "is not converted")
    longest = max(len(text or "") for text in vocabulary.texts)
    if longest > _LONGEST_PIECE:
        raise InputError(
            f"{s.where}: {_PREFIX}tokens holds a piece of {longest} characters, more than {_LONGEST_PIECE}"
        )
    scores = s.numbers(_PREFIX + "scores", len(vocabulary.texts))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            **_bpe(vocabulary, _merges(vocabulary, scores)),
            "unk_token": vocabulary.text("unk"),
            "fuse_unk": True,
            "byte_fallback": _BYTE in vocabulary.types,
        },
    }


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[list[str]]:
    """All pairs of pieces that make a piece: the best piece first, of equal ones the longer left side."""
    ids, pairs = vocabulary.by_text(), []
    for number, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True)):
        if text is None or kind not in (_NORMAL, _USER):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                pairs.append((-scores[number], -len(left), -len(right), left, right))
    return [[left, right] for *_, left, right in sorted(pairs)]


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What a text gets before and after it."""
    before = [vocabulary.special["bos"]] if vocabulary.add_bos else []
    after = [vocabulary.special["eos"]] if vocabulary.add_eos else []
    if not before + after:
        return None

    def around(name: str, segment: int) -> list[dict[str, Any]]:
        def special(number: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": vocabulary.texts[number], "type_id": segment}}

        middle = {"Sequence": {"id": name, "type_id": segment}}
        return [*map(special, before), middle, *map(special, after)]

    tokens = {
        str(vocabulary.texts[number]): {
            "id": vocabulary.texts[number],
            "ids": [number],
            "tokens": [vocabulary.texts[number]],
        }
        for number in before + after
    }
    single, pair = around("A", 0), around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
