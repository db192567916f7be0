"""The work of `recipes/chat.py`: answer a prompt, or what is typed, as it comes."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.config.chat import ChatRecipe
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.errors import InputError
from nemo_minitron.files import remove_stale
from nemo_minitron.workflows.chat import engines
from nemo_minitron.workflows.chat.check import Prepared, first

CONVERSATION = "conversation.jsonl"
_NEW = "/new"


def run(r: ChatRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Answer; every exchange is added to RUN/conversation.jsonl as it ends.

    Returns:
        The fields of `result.json`.
    """
    if not prepared.has_template:
        print("no chat template: each message is gone on with as it is", file=sys.stderr, flush=True)
    file = remove_stale(directory / CONVERSATION)
    answers, seconds, tokens = 0, 0.0, 0
    last = None
    with engines.opened(r, prepared) as engine:
        for messages in _asked(r):
            begin = time.monotonic()
            last = _answered(engine, messages, one=r.prompt is not None)
            if last is None:
                messages.pop()
                continue
            seconds, tokens, answers = seconds + time.monotonic() - begin, tokens + last.tokens, answers + 1
            _keep(file, messages, last)
            messages.append({"role": "assistant", "content": last.text})
    return {
        "recipe": "chat",
        "source": str(r.source),
        "engine": "transformers" if prepared.file is None else "llama.cpp",
        "chat_template": prepared.has_template,
        "answers": answers,
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 2) if seconds else 0.0,
        "last_answer": None if last is None else last.text,
        "last_answer_ended": None if last is None else last.ended,
        "peak_rss_gib": peak_rss_gib(),
    }


def _asked(r: ChatRecipe) -> Iterator[list[dict[str, str]]]:
    """Conversations that end with a message of the user's; what is appended to one is remembered."""
    messages = first(r)
    if r.prompt is not None:
        yield messages
        return
    for line in _typed():
        if line.strip() == _NEW:
            messages = first(r)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            yield messages


def _typed() -> Iterator[str]:
    """Lines of the terminal, or of what is piped in."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (arrow keys and history)

    print("a message a line; /new begins a new conversation, Ctrl-D ends", file=sys.stderr, flush=True)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _answered(engine: engines.Engine, messages: list[dict[str, str]], *, one: bool) -> engines.Answer | None:
    """The answer, shown while it comes; None where a typed message cannot be answered, which one line says."""
    try:
        found = engine.answer(messages, lambda text: print(text, end="", flush=True))
    except InputError as error:
        if one:
            raise
        print(f"{error}; {_NEW} begins a new conversation", file=sys.stderr, flush=True)
        return None
    print(flush=True)
    return found


def _keep(file: Path, messages: list[dict[str, str]], answer: engines.Answer) -> None:
    row = {"messages": [*messages, {"role": "assistant", "content": answer.text}], "ended": answer.ended}
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps(row, ensure_ascii=False) + "\n")
