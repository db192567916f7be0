"""A GGUF file's answers beside transformers': llama.cpp's greedy text after the same tokens must be the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.conversations import write_jsonl
from nemo_minitron.errors import FailedRun
from nemo_minitron.evaluation.instruct import Item
from nemo_minitron.export import llama_cpp

GGUF_ANSWERS = "gguf_answers.jsonl"
# What is made of a character that the limit of tokens cut: of its bytes together, or of each.
_CUT = "\ufffd"


def compared(
    file: Path, items: Sequence[Item], said: Sequence[str], most: int, directory: Path
) -> dict[str, Any]:
    """llama.cpp's answers beside transformers'; `directory`/gguf_answers.jsonl has both.

    Args:
        file: GGUF, of the model that answered.
        said: its answers to the items, of at most `most` tokens.

    Returns:
        The fields of `result.json`.

    Raises:
        FailedRun: one of them differs; names the first.
        RuntimeError: llama.cpp does not open the file, or does not answer.
    """
    rows: list[dict[str, Any]] = []
    context = max(len(item.tokens) for item in items) + most
    with llama_cpp.opened(file, context, exact=True) as server:
        for item, text in zip(items, said, strict=True):
            other = llama_cpp.continuation(server, item.tokens, most).rstrip(_CUT)
            text = text.rstrip(_CUT)
            rows.append(
                {"where": item.where, "transformers": text, "llama_cpp": other, "equal": text == other}
            )
    path = write_jsonl(directory / GGUF_ANSWERS, rows)
    if differing := [row for row in rows if not row["equal"]]:
        first = differing[0]
        raise FailedRun(
            f"llama.cpp answers {len(differing)} of {len(rows)} prompts otherwise than transformers, the first at "
            f"{first['where']}: {first['llama_cpp'][:80]!r}, not {first['transformers'][:80]!r}; see {path}"
        )
    return {"gguf": str(file), "gguf_answers": len(rows), "gguf_answers_equal": len(rows)}
