"""What answers: transformers' generate, or llama.cpp. Both tell each piece of text as it comes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.chat import ChatRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.errors import InputError
from nemo_minitron.export import huggingface, llama_cpp
from nemo_minitron.nemo.huggingface import exported_once, load_huggingface
from nemo_minitron.workflows.chat.check import Prepared, prompt_ids

Say = Callable[[str], object]


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens`: how many were written, that which ended it included; `ended`: by itself, not by a limit."""

    text: str
    tokens: int
    ended: bool


class Engine(Protocol):
    """A loaded model."""

    def answer(self, messages: list[dict[str, str]], say: Say) -> Answer:
        """Answer a conversation.

        Raises:
            InputError: it does not fit the context, or holds a control token.
        """


@contextmanager
def opened(r: ChatRecipe, prepared: Prepared) -> Iterator[Engine]:
    """The model, for as long as it is used."""
    if prepared.file is None:
        yield _Transformers(r, prepared)
        return

    with llama_cpp.opened(prepared.file, prepared.context, r.chat.threads) as server:
        engine = _LlamaCpp(r, prepared, server)
        try:
            yield engine
        finally:
            # Else a traceback that holds the engine keeps llama.cpp's threads.
            engine.server = None


class _Transformers:
    def __init__(self, r: ChatRecipe, prepared: Prepared) -> None:
        import torch

        self.r, self.prepared = r, prepared
        directory = exported_once(prepared.source, cache_dir(r.data, "exports"))
        source = find_source(directory)
        vocab = source.architecture.vocab_size
        self.tokenizer = huggingface.load_tokenizer(directory, vocab)
        self.settings = huggingface.generation_settings(directory, vocab) | _sampling(r)
        model = load_huggingface(source)
        self.model = model.cuda() if torch.cuda.is_available() else model.float()
        torch.manual_seed(r.seed)

    def answer(self, messages: list[dict[str, str]], say: Say) -> Answer:
        import torch
        from transformers import GenerationConfig

        ids = prompt_ids(self.tokenizer, messages, self.prepared.has_template)
        room = _room(len(ids), self.prepared.context, self.r.chat.max_new_tokens)
        given = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            whole = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=GenerationConfig(**self.settings),
                max_new_tokens=room,
                streamer=_streamer(self.tokenizer, say),
            )
        new = whole[0, len(ids) :].tolist()
        stops = self.settings.get("eos_token_id")
        ended = bool(new) and new[-1] in (stops if isinstance(stops, list) else [stops])
        return Answer(self.tokenizer.decode(new, skip_special_tokens=True), len(new), ended)


def _sampling(r: ChatRecipe) -> dict[str, Any]:
    """What the user chose instead of the model's own settings."""
    chosen: dict[str, Any] = {}
    if r.chat.top_p is not None:
        chosen |= {"do_sample": True, "top_p": r.chat.top_p}
    if r.chat.temperature:
        chosen |= {"do_sample": True, "temperature": r.chat.temperature}
    elif r.chat.temperature == 0:
        chosen |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return chosen


def _streamer(tokenizer: Any, say: Say) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Tells text once it is whole words."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class _LlamaCpp:
    def __init__(self, r: ChatRecipe, prepared: Prepared, server: Any) -> None:
        self.r, self.prepared, self.server = r, prepared, server

    def answer(self, messages: list[dict[str, str]], say: Say) -> Answer:
        asked = {
            "max_tokens": self.r.chat.max_new_tokens,
            "temperature": self.r.chat.temperature or 0.0,
            "top_p": 1.0 if self.r.chat.top_p is None else self.r.chat.top_p,
            "seed": self.r.seed,
            "stream": True,
            "cache_prompt": True,
        }
        heard = _Heard(say)
        if self.prepared.has_template:
            self.server.handle_chat_completions({**asked, "messages": messages}, heard)
        else:
            self.server.handle_completions({**asked, "prompt": messages[-1]["content"]}, heard)
        return heard.answer()


class _Heard:
    """Gathers what llama.cpp's server streams."""

    def __init__(self, say: Say) -> None:
        self.say, self.pieces, self.tokens, self.ended = say, list[str](), 0, False

    def __call__(self, chunk: Any) -> bool:
        """Told each chunk; false goes on."""
        if "error" in chunk:
            error = chunk["error"]
            raise_on = InputError if error.get("type") == "exceed_context_size_error" else RuntimeError
            self.failure: Exception = raise_on(f"llama.cpp: {error.get('message')}")
            return True
        for choice in chunk.get("choices", ()):
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text:
                self.pieces.append(text)
                self.say(text)
            self.ended = self.ended or choice.get("finish_reason") == "stop"
        self.tokens = (chunk.get("timings") or {}).get("predicted_n", self.tokens)
        return False

    def answer(self) -> Answer:
        """The whole."""
        if (failure := getattr(self, "failure", None)) is not None:
            raise failure
        return Answer("".join(self.pieces), self.tokens, self.ended)


def _room(length: int, context: int, wanted: int) -> int:
    if length >= context:
        raise InputError(f"the conversation has {length} tokens, the model was made for {context}")
    return min(wanted, context - length)
