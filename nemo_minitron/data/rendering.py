"""Chat templates are programs of strangers: they are rendered by transformers, in Jinja's sandbox, within limits.

The sandbox keeps a template from Python's objects, but not from taking for ever: two nested loops over 99,999, a power
of a billion digits. So before a tokenizer is used, its template renders a few conversations in a child process that has
some seconds and some memory; whatever becomes of the child, this process is well. After that each rendering may run so
many lines. What is left: a template that behaves on the tried conversations and does one endless operation that is not
a loop on another.
"""

import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Lines of a template, or of the filters that it calls; published templates take a few hundred a message.
MOST_LINES = 1_000_000
_CPU_S, _WALL_S = 3, 60
_THREADS = "TOKENIZERS_PARALLELISM"
_MOMENT = datetime.now()
# As transformers/tokenization_utils_base.py@4.51.3 looks for it.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MEMORY = 1 << 30  # bytes, above what the process has
_LONGEST = 16 << 20  # characters of one rendered conversation
_TAKES_TOO_LONG = f"it takes too long: more than {_CPU_S} s or {MOST_LINES:,} lines"


class TooLong(Exception):
    """A rendering has run more lines than it may."""


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], where: str, *, prompt: bool = False
) -> str:
    """What a tokenizer's template makes of messages, as `apply_chat_template` gives it.

    Args:
        messages: of one conversation.
        where: what a refusal begins with.
        prompt: whether the beginning of the assistant's turn follows.

    Raises:
        InputError: the template refuses the messages, fails on them, or runs over `MOST_LINES`.
    """
    try:
        with _at_most(MOST_LINES):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, strftime_now=strftime_now
            )
        text.encode()  # half of a surrogate pair is no text that a tokenizer takes
        if len(text) > _LONGEST:
            raise TooLong(f"it writes {len(text):,} characters, at most {_LONGEST:,} are taken")
    # It is the template's own program that fails: there is no exception that it could not raise.
    except Exception as error:
        raise _cannot(error, where) from None
    return str(text)


def marked_tokens(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], where: str
) -> list[int] | None:
    """For each token of the rendered messages whether it lies inside of the template's `{% generation %}` marks, 1 or
    0, as `apply_chat_template` gives it; None where the template has no such marks.

    Raises:
        InputError: as `render`.
    """
    if not _MARK.search(tokenizer.get_chat_template()):
        return None
    try:
        with _at_most(MOST_LINES):
            found = tokenizer.apply_chat_template(
                list(messages),
                return_dict=True,
                return_assistant_tokens_mask=True,
                strftime_now=strftime_now,
            )
    except Exception as error:
        raise _cannot(error, where) from None
    return [int(mark) for mark in found["assistant_masks"]]


def strftime_now(format: str) -> str:
    """What templates ask for the date with. One moment for a whole process: a prompt and its answer are rendered one
    after the other, and must not fall on two days, or on two seconds."""
    return _MOMENT.strftime(format)


def _cannot(error: Exception, where: str) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{where}: the chat template cannot render it ({reason})")


@contextmanager
def _at_most(lines: int) -> Iterator[None]:
    """Within it, this thread may run so many lines of Python; works in every thread, and is the same on any machine."""
    left, before = lines, sys.gettrace()

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooLong(_TAKES_TOO_LONG)
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def try_template(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Any]], where: str
) -> None:
    """Render conversations in a child process; what the template refuses or makes of them is not judged here.

    Raises:
        InputError: it takes more than 3 s of CPU, a minute in all, 1 GiB or `MOST_LINES`, or ends the process.
    """
    reading, writing = os.pipe()
    child = _forked()
    if child == 0:
        _render_and_exit(tokenizer, conversations, writing)
    os.close(writing)
    try:
        said = _answer(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # it has ended, or shall
        os.waitpid(child, 0)
    if said is not None:
        raise InputError(f"{where}: the chat template cannot render it ({said})")


def _forked() -> int:
    """`os.fork`, of which `tokenizers` warns where nothing says that the child needs none of its threads."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = before or "false"
    child = os.fork()
    if before is None:
        del os.environ[_THREADS]
    return child


def _answer(reading: int) -> str | None:
    """What is wrong, None if nothing is."""
    deadline, heard = time.monotonic() + _WALL_S, b""
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(reading, 4096)
        if not block:
            break
        heard += block
    return json.loads(heard) if heard else _TAKES_TOO_LONG


def _render_and_exit(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Any]], writing: int
) -> None:
    said: str | None = None
    try:
        with open("/proc/self/statm") as file:
            memory = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        said = _render_all(tokenizer, conversations)
    finally:
        os.write(writing, json.dumps(said).encode())
        os._exit(0)


def _render_all(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Any]]) -> str | None:
    """What the template takes too much of. Whether it fails is seen again, and said, where its text is needed."""
    for messages in conversations:
        for prompt in (False, True):
            try:
                with _at_most(MOST_LINES):
                    tokenizer.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=prompt
                    )
            except TooLong:
                return _TAKES_TOO_LONG
            except MemoryError:
                return "it takes more than 1 GiB of memory"
            except Exception:
                continue
    return None
