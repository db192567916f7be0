"""A session whose ranks do together what one of them asks."""

from collections.abc import Callable, Sequence
from typing import Any

from nemo_minitron import parallel
from nemo_minitron.environment import rank
from nemo_minitron.evaluation.likelihood import Likelihood, log_likelihoods
from nemo_minitron.evaluation.multiple_choice import Request
from nemo_minitron.nemo.session import Session
from nemo_minitron.nemo.text_generation import write_until

# Batches of each data-parallel rank between two times that answers are kept.
_BATCHES = 4


class ShardedModel:
    """Answers requests under any layout. Rank 0 has the requests and asks; the others are in `serve` meanwhile.

    Args:
        tokenizer: of Hugging Face.
        ends: tokens that end an answer.
        batch_size: rows in a forward pass.
    """

    def __init__(self, session: Session, tokenizer: Any, ends: Sequence[int | None], batch_size: int) -> None:
        self.session, self.tokenizer = session, tokenizer
        self.ends = [end for end in ends if end is not None]
        self.batch_size = batch_size
        self.max_length = session.source.seq_length
        self.slice_requests = _BATCHES * batch_size * parallel.dp_size()
        self._jobs: dict[str, Callable[..., Any]] = {"score": self._score, "write": self._write}

    def log_likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Of rank 0's requests; see `evaluation.likelihood`."""
        return self._together("score", [(request.tokens, request.scored) for request in requests])

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: list[str]
    ) -> list[list[int]]:
        """Greedy continuations of rank 0's prompts; see `text_generation.write_until`."""
        return self._together("write", [list(prompt) for prompt in prompts], max_new_tokens, stops)

    def serve(self) -> None:
        """On all ranks but the first: take part until `dismiss`."""
        while (job := parallel.broadcast_object(None)) is not None:
            self._jobs[job[0]](*job[1])

    def dismiss(self) -> None:
        """On rank 0: the others go on after `serve`."""
        assert rank() == 0
        parallel.broadcast_object(None)

    def _together(self, name: str, *arguments: Any) -> Any:
        parallel.broadcast_object((name, arguments))
        return self._jobs[name](*arguments)

    def _score(self, requests: list[tuple[list[int], int]]) -> list[Likelihood]:
        return log_likelihoods(
            self.session.chunks,
            [Request(*request) for request in requests],
            self.session.architecture.vocab_size,
            batch_size=self.batch_size,
        )

    def _write(self, prompts: list[list[int]], max_new_tokens: int, stops: list[str]) -> list[list[int]]:
        return write_until(
            self.session,
            prompts,
            max_new_tokens=max_new_tokens,
            ends=self.ends,
            stops=stops,
            decode=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=False),
            batch_size=self.batch_size,
        )
