"""A sharded model that writes with Megatron-core's text generation."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers import inference_wrapper_config
from megatron.core.inference.model_inference_wrappers.gpt import gpt_inference_wrapper as gpt
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers import text_generation_controller
from nemo.collections.llm.inference.base import MCoreTokenizerWrappper

from nemo_minitron import parallel
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.recipes import SynthesizeRecipe
from nemo_minitron.nemo.session import Session
from nemo_minitron.padding import padded_rows


class _Controller(text_generation_controller.TextGenerationController):
    """Samples from the vocabulary without padding: with more columns the same seed would draw other tokens."""

    columns: int

    def sample_from_logits(self, last_token_logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """As Megatron's."""
        return super().sample_from_logits(last_token_logits[:, : self.columns], *arguments, **options)


def _controller(
    session: Session, rows: int, length: int, kind: type[_Controller] = _Controller
) -> _Controller:
    """Over a static batch of at most so many rows and tokens."""
    (model,) = session.chunks
    vocab_size = session.source.architecture.vocab_size
    sizes = inference_wrapper_config.InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=padded_rows(vocab_size, session.layout.tensor_model_parallel_size),
        inference_max_requests=rows,
        inference_max_seq_length=length,
    )
    wrapped = gpt.GPTInferenceWrapper(model, sizes, StaticInferenceContext.from_config(sizes))
    tokenizer = MCoreTokenizerWrappper(session.model.tokenizer, vocab_size)
    controller = kind(inference_wrapped_model=wrapped, tokenizer=tokenizer)
    controller.columns = vocab_size
    return controller


def _requests(prompts: Sequence[Sequence[int]], params: SamplingParams) -> dict[str, InferenceRequest]:
    return {
        str(i): InferenceRequest(
            request_id=str(i),
            prompt="",
            prompt_tokens=list(prompt),
            sampling_params=params,
            status=Status.ACTIVE_BUT_NOT_GENERATING_TOKENS,
        )
        for i, prompt in enumerate(prompts)
    }


class MegatronGenerator:
    """Megatron-core's TextGenerationController over a static batch with a key-value cache, under any tensor- and
    pipeline-parallel layout; every rank of a model writes the same text.

    Args:
        source: of kind "nemo".
        length: of the longest prompt with all that is written after it, in tokens.

    Source: megatron/core/inference/text_generation_controllers/text_generation_controller.py@0.13.1.
    """

    def __init__(self, r: SynthesizeRecipe, source: Source, length: int) -> None:
        self.settings = r.synthesize
        # A single new token has no sequence to share.
        layout = dataclasses.replace(r.trainer, sequence_parallel=False)
        self.session = Session(source, layout, seq_length=source.seq_length)
        self.controller = _controller(self.session, r.synthesize.batch_size, length)

    def write(self, prompts: list[list[int]], seed: int) -> list[tuple[list[int], bool, float]]:
        """See `Generator`."""
        s = self.settings
        params = SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k or 0,
            top_p=0.0 if s.top_p == 1 else s.top_p,
            num_tokens_to_generate=s.max_new_tokens,
            return_log_probs=True,
        )
        requests = _requests(prompts, params)
        torch.manual_seed(seed)
        self.controller.generate_all_output_tokens_static_batch(requests)
        return [self._written(request) for request in requests.values()]

    def _written(self, request: Any) -> tuple[list[int], bool, float]:
        new = request.generated_tokens.tolist()
        return new, len(new) < self.settings.max_new_tokens, -float(sum(request.generated_log_probs))


class _UntilStops(_Controller):
    """Ends a row at one of several tokens, or where its text holds one of several strings."""

    ends: frozenset[int]
    stops: list[str]
    starts: list[int]
    most: int
    decode: Callable[[list[int]], str]

    def update_generation_status(
        self,
        updated_prompts_tokens: torch.Tensor,
        generation_started: torch.Tensor,
        current_context_end_position: int,
        is_generation_done_tensor: torch.Tensor,
        generated_sequence_lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Megatron's; the token with which a string is complete belongs to the answer, an end token does not."""
        position = int(current_context_end_position) + 1
        latest = updated_prompts_tokens[:, position - 1].tolist()
        running = (generation_started & ~is_generation_done_tensor).tolist()
        ended = [run and token in self.ends for run, token in zip(running, latest, strict=True)]
        counted = [run and not end for run, end in zip(running, ended, strict=True)]
        for row in (row for row, counts in enumerate(counted) if counts and self.stops):
            # As many tokens as the longest string has bytes hold it, whatever stands before it.
            begin = max(self.starts[row], position - max(len(stop.encode()) for stop in self.stops))
            text = self.decode(updated_prompts_tokens[row, begin:position].tolist())
            ended[row] = any(stop in text for stop in self.stops)
        generated_sequence_lengths += torch.tensor(counted, device=generated_sequence_lengths.device)
        # Megatron goes on with the shorter prompts until the longest has its tokens.
        is_generation_done_tensor = is_generation_done_tensor | (generated_sequence_lengths >= self.most)
        done = is_generation_done_tensor | torch.tensor(ended, device=is_generation_done_tensor.device)
        return done, generated_sequence_lengths.int()


def write_until(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Iterable[int],
    stops: Sequence[str],
    decode: Callable[[list[int]], str],
    batch_size: int,
) -> list[list[int]]:
    """Greedy continuations by Megatron-core's static batches, the same on every rank; every rank calls.

    Args:
        session: without sequence parallelism.
        ends: tokens that end an answer, and are not of it.
        stops: strings that end one; the tokens that complete one are of it.
        decode: of tokens to text.
        batch_size: prompts at a time; data-parallel ranks share the batches.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, list[int]] = {}
    params = SamplingParams(top_k=1, num_tokens_to_generate=max_new_tokens, return_log_probs=False)
    for begin in range(parallel.dp_rank() * batch_size, len(order), parallel.dp_size() * batch_size):
        numbers = order[begin : begin + batch_size]
        chosen = [prompts[i] for i in numbers]
        controller = _controller(session, len(chosen), len(chosen[0]) + max_new_tokens, _UntilStops)
        assert isinstance(controller, _UntilStops)
        controller.ends, controller.stops, controller.decode = frozenset(ends), list(stops), decode
        controller.starts, controller.most = [len(prompt) for prompt in chosen], max_new_tokens
        requests = _requests(chosen, params)
        controller.generate_all_output_tokens_static_batch(requests)
        found |= {i: r.generated_tokens.tolist() for i, r in zip(numbers, requests.values(), strict=True)}
    whole = {number: new for part in parallel.gather_objects(found, "dp") for number, new in part.items()}
    return [whole[number] for number in range(len(prompts))]
