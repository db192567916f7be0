"""How a document begins: the tokens that a tokenizer puts before a text by itself, unless a setting says otherwise."""

from typing import TYPE_CHECKING

from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"


def check_bos(bos: object) -> None:
    """Refuse an invalid `data.bos`.

    Raises:
        InputError: names it and what would be legal.
    """
    if bos != AUTO and type(bos) is not bool:
        raise InputError(f"data.bos={bos}: must be auto (as the tokenizer does by itself), true or false")


def beginning(tokenizer: "PreTrainedTokenizerBase", bos: object = AUTO) -> list[int]:
    """The ids that each document begins with; none for most tokenizers, `bos_token_id` for Llama's and Gemma's.

    Args:
        tokenizer: of Hugging Face.
        bos: "auto": what the tokenizer does when it is asked to add special tokens, whether a flag, a template or its
            class makes it do so; true: its beginning token at least; false: none.

    Raises:
        InputError: `data.bos` is none of these, or true and the tokenizer has no beginning token.
    """
    check_bos(bos)
    if bos is False:
        return []
    own = _own(tokenizer)
    if own or bos == AUTO:
        return own
    if tokenizer.bos_token_id is None:
        raise InputError(
            "data.bos=true: the tokenizer has no beginning token (bos_token); must be auto or false"
        )
    return [tokenizer.bos_token_id]


def _own(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return list(whole[:at])
    raise InputError(
        "data.bos=auto: cannot be told, the tokenizer's special tokens change the text's own; must be true or false"
    )
