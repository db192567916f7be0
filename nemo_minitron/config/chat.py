"""The schema of `recipes/chat.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.ranges import PathName, Positive, Range
from nemo_minitron.config.recipes import CommonConfig


@dataclass
class ChatConfig:
    """How answers are written.

    `system`: the first message, of the role system; null: none. `max_new_tokens`: of an answer. `temperature`, `top_p`:
    null takes the model's own settings, and the most probable token where it has none; temperature 0 is the most
    probable token. `threads`: of llama.cpp, for GGUF files; `context`: of llama.cpp, in tokens, at most; memory grows
    with it.
    """

    system: str | None = None
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Range(least=0, most=1000)] | None = None
    top_p: Annotated[float, Range(above=0, most=1)] | None = None
    threads: Annotated[int, Range(least=1, most=1024)] = 1
    context: Annotated[int, Range(least=16)] = 4096


@dataclass
class ChatRecipe(CommonConfig):
    """`recipes/chat.py`. `source`: a run directory, a NeMo 2 or Hugging Face directory, a GGUF file, or what
    `recipes/export.py` wrote. `prompt`: one message to answer; null: messages are read from the terminal, a line each,
    until its end; `/new` begins a new conversation.
    """

    source: PathName = MISSING
    prompt: str | None = None
    chat: ChatConfig = field(default_factory=ChatConfig)
