"""lm-evaluation-harness's `LM` over a sharded model: texts to tokens and back, and what was answered before.

Source: lm_eval/api/model.py@0.4.13 (`TemplateLM`); tokens are made as lm_eval/models/huggingface.py@0.4.13 makes them.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_minitron.errors import FailedRun
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.likelihood import Likelihood
from nemo_minitron.evaluation.multiple_choice import Request

_MAX_NEW_TOKENS = 256  # where a task names no number; the harness's own


class Model(Protocol):
    """What answers: a sharded model, of all of whose ranks one asks."""

    max_length: int
    slice_requests: int

    def log_likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """See `evaluation.likelihood`."""

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: list[str]
    ) -> list[list[int]]:
        """Greedy continuations in tokens, up to one of the stops or an end token, which may be in them."""


class ShardedLM(TemplateLM):
    """The harness's language model.

    Args:
        tokenizer: of Hugging Face.
        answers: what was answered before.
        asked: told how many requests there are, `answered` how many of them are done.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        answers: Answers,
        asked: Callable[[int], object] = lambda _: None,
        answered: Callable[[int], object] = lambda _: None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.answers = model, tokenizer, answers
        self._asked, self._answered = asked, answered
        self.cut = 0  # questions that the context does not hold, cut from the left

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The harness wants one where there is a chat template."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens, with those that the tokenizer adds by itself unless the text begins with them."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template in Jinja."""
        return self.tokenizer.chat_template or ""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Likelihood]:
        """As the harness's own, without its progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Likelihood]:
        most = self.model.max_length + 1  # the last token is predicted, never read
        made = []
        for _text, context, continuation in requests:
            tokens = [*context, *continuation]
            if not continuation or len(continuation) > self.model.max_length:
                raise FailedRun(
                    f"a choice of {len(continuation)} tokens; must have 1 to {self.model.max_length}"
                )
            self.cut += len(tokens) > most
            made.append(Request(tokens[-most:], len(continuation)))
        found = self._known_or_asked(made, _key_of_request, self.model.log_likelihoods)
        return [(value, best) for value, best in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows as long as the context."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(part)) for part in parts]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, up to one of a request's stops."""
        found: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in kinds.values():
            texts = [requests[n].args[0] for n in numbers]
            found |= dict(zip(numbers, self._generate(texts, requests[numbers[0]].args[1]), strict=True))
        return [found[number] for number in range(len(requests))]

    def answer(self, conversations: list[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations that end with a message of the user's."""
        settings = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens}
        return self._generate([self.apply_chat_template(talk) for talk in conversations], settings)

    def _generate(self, texts: list[str], settings: dict[str, Any]) -> list[str]:
        """Of texts that are gone on with alike."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        if options.get("do_sample"):
            raise FailedRun("a task wants sampled answers; only greedy ones are written here")
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops, new = handle_stop_sequences(options["until"], eos=end), options["max_gen_toks"]
        if (room := self.model.max_length - new) < 1:
            raise FailedRun(f"max_gen_toks={new}: the context has {self.model.max_length} tokens")
        prompts = [self.tok_encode(text) for text in texts]
        self.cut += sum(len(prompt) > room for prompt in prompts)
        return self._known_or_asked(
            [prompt[-room:] for prompt in prompts],
            lambda prompt: ["generate_until", prompt, new, stops],
            lambda asked: [self._text(tokens, stops) for tokens in self.model.write(asked, new, stops)],
        )

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, stops, None)

    def _known_or_asked(
        self, asked: list[Any], key: Callable[[Any], list[Any]], answer: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answers by request, see `Answers.known_or_asked`."""
        requests = [(self.answers.key(key(request)), request, _length(request)) for request in asked]
        return self.answers.known_or_asked(
            requests, self.model.slice_requests, answer, self._asked, self._answered
        )


def _key_of_request(request: Request) -> list[Any]:
    return ["loglikelihood", request.tokens, request.scored]


def _length(request: Any) -> int:
    return len(request.tokens) if isinstance(request, Request) else len(request)
