"""A sharded teacher that writes with Megatron-core's text generation."""

import dataclasses
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers import inference_wrapper_config
from megatron.core.inference.model_inference_wrappers.gpt import gpt_inference_wrapper as gpt
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers import text_generation_controller
from nemo.collections.llm.inference.base import MCoreTokenizerWrappper

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.recipes import SynthesizeRecipe
from nemo_minitron.nemo.session import Session, nemo_tokenizer
from nemo_minitron.padding import padded_rows


class _Controller(text_generation_controller.TextGenerationController):
    """Samples from the vocabulary without padding: with more columns the same seed would draw other tokens."""

    columns: int

    def sample_from_logits(self, last_token_logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """As Megatron's."""
        return super().sample_from_logits(last_token_logits[:, : self.columns], *arguments, **options)


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
        (model,) = self.session.chunks
        sizes = inference_wrapper_config.InferenceWrapperConfig(
            hidden_size=model.config.hidden_size,
            params_dtype=model.config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=padded_rows(
                source.architecture.vocab_size, r.trainer.tensor_model_parallel_size
            ),
            inference_max_requests=r.synthesize.batch_size,
            inference_max_seq_length=length,
        )
        wrapped = gpt.GPTInferenceWrapper(model, sizes, StaticInferenceContext.from_config(sizes))
        tokenizer = MCoreTokenizerWrappper(nemo_tokenizer(source.tokenizer), source.architecture.vocab_size)
        self.controller = _Controller(inference_wrapped_model=wrapped, tokenizer=tokenizer)
        self.controller.columns = source.architecture.vocab_size

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
        requests = {
            str(i): InferenceRequest(
                request_id=str(i),
                prompt="",
                prompt_tokens=prompt,
                sampling_params=params,
                status=Status.ACTIVE_BUT_NOT_GENERATING_TOKENS,
            )
            for i, prompt in enumerate(prompts)
        }
        torch.manual_seed(seed)
        self.controller.generate_all_output_tokens_static_batch(requests)
        return [self._written(request) for request in requests.values()]

    def _written(self, request: Any) -> tuple[list[int], bool, float]:
        new = request.generated_tokens.tolist()
        return new, len(new) < self.settings.max_new_tokens, -float(sum(request.generated_log_probs))
