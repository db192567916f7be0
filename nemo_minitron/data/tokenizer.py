"""Tokenizers: train a byte-level BPE, load one in Hugging Face format, and name one by its content."""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import scratch
from nemo_minitron.checkpoints.untrusted import check_no_pointer, check_regular, read_json
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.files import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_BYTES = 256

# The split that llama.cpp knows as "qwen2": digits one by one, a run of spaces as one piece that leaves the
# last space to the word after it, a word with one character before it (".join", "_name"), punctuation with
# the line end after it. A known split matters: a GGUF file holds no regular expression, only the name of one.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_trained_here(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer is one that `train_bpe` made, by its two special tokens."""
    return tokenizer.convert_ids_to_tokens([0, 1]) == [EOS, PAD]


def train_bpe(texts: Iterable[str], vocab_size: int, out_dir: str | Path) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE and write it where `AutoTokenizer.from_pretrained` reads it.

    It is lossless on any Unicode text and deterministic. Id 0 is `<|endoftext|>`, end of document and also
    the beginning of one (in packed text each document follows another's end); id 1 is `<|pad|>`, never used
    in text.

    Args:
        texts: the text to learn from, walked once.
        vocab_size: the size of the vocabulary, exactly, special tokens included; a multiple of 128 leaves
            nothing to pad when the embedding is sharded.
        out_dir: gets tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        InputError: a size too small for 256 bytes and the special tokens, or larger than what the text gives.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore
    from transformers import PreTrainedTokenizerFast

    smallest = _BYTES + len((EOS, PAD))
    if vocab_size < smallest:
        raise InputError(
            f"data.vocab_size={vocab_size}: a byte-level vocabulary needs at least {smallest} entries"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise InputError(
            f"data.vocab_size={vocab_size}: the text has pieces for only {bpe.get_vocab_size()} entries; "
            f"use at most that many, or more text"
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(str(out_dir))
    return tokenizer


def load_tokenizer(path_or_id: str | Path) -> "PreTrainedTokenizerBase":
    """Load a Hugging Face tokenizer, from a directory without the network or by hub id, never its code.

    Raises:
        InputError: it cannot be loaded, or it has no end-of-text token to end documents with.
    """
    name = str(path_or_id)
    is_directory = Path(name).is_dir()
    if not is_directory and (isinstance(path_or_id, Path) or name.startswith(("/", ".", "~"))):
        raise InputError(
            f"data.tokenizer={name}: no such directory; give a tokenizer's directory or a hub id"
        )
    if is_directory:
        _check_files(Path(name), f"data.tokenizer={name}")
    try:
        tokenizer = _load(name, is_directory)
    except InputError:
        raise
    except Exception as error:  # `tokenizers` raises no narrower one for a broken file
        fetch = (
            ""
            if is_directory
            else f"; `huggingface-cli download {name} --local-dir DIR` where the hub is reachable"
        )
        raise InputError(
            f"data.tokenizer={name}: cannot be loaded ({first_line(error)[:200]}){fetch}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"data.tokenizer={name}: has no end-of-text token (eos_token), which ends each document"
        )
    return tokenizer


def _check_files(directory: Path, where: str) -> None:
    check_regular(directory, where)
    try:
        check_tokenizer_files(directory)
    except OSError as error:
        raise InputError(f"{where}: cannot be loaded ({error})") from None
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            check_no_pointer(directory / name, where)


def _load(name: str, is_directory: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not is_directory:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if (changes := _changes_of_version_5(Path(name))) is None:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    return PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True, **changes)


def _changes_of_version_5(directory: Path) -> dict[str, Any] | None:
    """What to tell PreTrainedTokenizerFast of a tokenizer that transformers 5 saved; None where AutoTokenizer knows it.

    transformers 5 has one class for all that a tokenizer.json says, TokenizersBackend, and keeps in the list
    `extra_special_tokens` what was `additional_special_tokens`.
    """
    import transformers

    if not (directory / "tokenizer_config.json").is_file() or not (directory / "tokenizer.json").is_file():
        return None
    config = read_json(directory / "tokenizer_config.json", f"data.tokenizer={directory}")
    kind, extra = config.get("tokenizer_class"), config.get("extra_special_tokens")
    unknown = isinstance(kind, str) and not (
        hasattr(transformers, kind) or hasattr(transformers, f"{kind}Fast")
    )
    if "auto_map" in config or not (unknown or isinstance(extra, list)):
        return None
    if not isinstance(extra, list):
        return {}
    return {"extra_special_tokens": {}, "additional_special_tokens": extra}


@functools.cache
def as_version_4(directory: str | Path) -> Path:
    """The tokenizer's directory in the form that AutoTokenizer of this transformers reads; NeMo takes no other.

    Returns:
        The directory itself, or a copy that lives as long as this process.
    """
    if not Path(directory).is_dir() or _changes_of_version_5(Path(directory)) is None:
        return Path(directory)
    copy = scratch.lasting("tokenizer")
    load_tokenizer(directory).save_pretrained(str(copy))
    return copy


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hex sha256 over what decides a tokenizer's output: vocabulary, merges, rules, the end-of-text id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        # Truncation and padding are settings of the last call that used the object, not the tokenizer's own.
        rules = {
            key: value
            for key, value in json.loads(backend.to_str()).items()
            if key not in ("truncation", "padding")
        }
    named = json.dumps({"rules": rules, "eos": tokenizer.eos_token_id}, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()
