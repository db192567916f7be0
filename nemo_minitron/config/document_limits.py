"""Whether the documents of a packed sequence see each other, and where that can be chosen."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from nemo_minitron.errors import InputError


def check_limits(d: Any, context_parallel_size: int) -> None:
    """Refuse document limits that would not be kept.

    Args:
        d: a `DataConfig`.

    Raises:
        InputError: positions that begin anew without attention doing so; Transformer Engine, whose attention takes no
            such mask; context parallelism, which cuts sequences.
    """
    if d.reset_position_ids and not d.reset_attention_mask:
        raise InputError(
            "data.reset_position_ids=true: alone it keeps no document from another (and rotary embeddings do not read "
            "it); needs data.reset_attention_mask=true"
        )
    if not d.reset_attention_mask:
        return
    if importlib.util.find_spec("transformer_engine") is not None:
        raise InputError(
            "data.reset_attention_mask=true: Transformer Engine is installed, whose attention takes "
            "no mask of documents; must be false"
        )
    if context_parallel_size > 1:
        raise InputError(
            f"data.reset_attention_mask=true: must be false under trainer.context_parallel_size={context_parallel_size}"
        )


def check_ends(d: Any, beginning: Sequence[int], eod: int) -> None:
    """Refuse document limits where the token that ends documents also begins them: it would be one of its own.

    Raises:
        InputError: names the token.
    """
    if d.reset_attention_mask and eod in beginning:
        raise InputError(
            f"data.reset_attention_mask=true: documents begin with the token that ends them, id {eod}; must be "
            "false, or data.bos=false"
        )


def refuse_limits(d: Any, what: str) -> None:
    """Refuse them where `what` has no place for a mask.

    Raises:
        InputError: names it.
    """
    if d.reset_attention_mask:
        raise InputError(f"data.reset_attention_mask=true: {what}; must be false")
