"""lm-evaluation-harness's own `hf` backend over a model of transformers, its answers kept like a sharded model's."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nemo_minitron.evaluation.benchmarks.answers import Answers

# Batches between two times that answers are kept.
_BATCHES = 4


class BackendLM(HFLM):
    """The harness's language model.

    Args:
        model: of transformers, for language modelling.
        max_length: its context, in tokens.
        answers, asked, answered: as of `adapter.ShardedLM`.

    Source: lm_eval/models/huggingface.py@0.4.13.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int,
        batch_size: int,
        answers: Answers,
        asked: Callable[[int], object],
        answered: Callable[[int], object],
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )
        self.answers, self.cut = answers, 0
        self._at_once, self._more, self._done = _BATCHES * batch_size, asked, answered

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the harness's own."""
        self.cut += sum(len(self.tok_encode("".join(r.args))) > self.max_length + 1 for r in requests)
        found = self._kept(requests, super().loglikelihood)
        return [(value, best) for value, best in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """As the harness's own."""
        return self._kept(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As the harness's own."""
        for text, settings in (r.args for r in requests):
            room = self.max_length - settings.get("max_gen_toks", self.max_gen_toks)
            self.cut += len(self.tok_encode(text)) > room
        return self._kept(requests, super().generate_until)

    def answer(self, conversations: list[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations that end with a message of the user's."""
        settings = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens}
        texts = [self.apply_chat_template(talk) for talk in conversations]
        return self.generate_until([Instance("generate_until", {}, (text, settings), 0) for text in texts])

    def _kept(self, requests: Sequence[Instance], ask: Callable[..., Sequence[Any]]) -> list[Any]:
        made = [
            (
                self.answers.key(["hf", r.request_type, *map(_plain, r.args)]),
                r,
                len("".join(map(str, r.args))),
            )
            for r in requests
        ]
        return self.answers.known_or_asked(
            made, self._at_once, lambda part: ask(part, disable_tqdm=True), self._more, self._done
        )


def _plain(argument: Any) -> Any:
    """A request's text, or the settings of an answer in one order."""
    return sorted(argument.items()) if isinstance(argument, dict) else argument
