"""What lets a teacher write: Megatron-core's text generation, Hugging Face's, or vLLM.

Every writer is called with a batch of prompts and a seed, and the same call gives the same text.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import SynthesizeRecipe, cache_dir
from nemo_minitron.config.synthesize import MEGATRON, SynthesizeConfig
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.nemo.huggingface import exported_once, load_huggingface
from nemo_minitron.workflows.preflight import converted


class Generator(Protocol):
    """A loaded teacher."""

    def write(self, prompts: list[list[int]], seed: int) -> list[tuple[list[int], bool, float]]:
        """Go on with each prompt: new token ids without the one that ended them, whether one did, and the sum of
        -log p of the new tokens in nats, at temperature 1."""


def make_generator(r: SynthesizeRecipe, teacher: Source, longest_prompt: int) -> Generator:
    """Load the teacher for the backend that the configuration names; every rank of the layout calls.

    Args:
        teacher: of any kind.
        longest_prompt: in tokens.
    """
    s = r.synthesize
    if s.backend == MEGATRON:
        from nemo_minitron.nemo.text_generation import MegatronGenerator  # NeMo; others do without

        return MegatronGenerator(r, converted(teacher, r.data), longest_prompt + s.max_new_tokens)
    directory = exported_once(teacher, cache_dir(r.data, "exports"))
    return HuggingFaceGenerator(directory, s) if s.backend == "huggingface" else VllmGenerator(directory, s)


class HuggingFaceGenerator:
    """transformers' `generate`, in one process.

    Args:
        directory: a Hugging Face checkpoint.
    """

    def __init__(self, directory: Path, settings: SynthesizeConfig) -> None:
        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.eos = load_tokenizer(directory).eos_token_id
        self.model = load_huggingface(find_source(directory, "teacher")).to(self.device)

    @torch.inference_mode()
    def write(self, prompts: list[list[int]], seed: int) -> list[tuple[list[int], bool, float]]:
        """See `Generator`."""
        s, longest = self.settings, max(map(len, prompts))
        ids = torch.tensor([[self.eos] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        torch.manual_seed(seed)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=s.temperature,
            top_k=s.top_k or 0,
            top_p=s.top_p,
            max_new_tokens=s.max_new_tokens,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        return [self._written(p, row[longest:].tolist()) for p, row in zip(prompts, output, strict=True)]

    def _written(self, prompt: list[int], new: list[int]) -> tuple[list[int], bool, float]:
        ended = self.eos in new
        new = new[: new.index(self.eos)] if ended else new
        # One text at a time: the logits of a whole batch may not fit.
        tokens = torch.tensor([prompt + new], device=self.device)
        logits = self.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :], reduction="sum")
        return new, ended, float(nats) if new else 0.0


class VllmGenerator:
    """vLLM, in one process. Every prompt has a seed of its own.

    Args:
        directory: a Hugging Face checkpoint.
    """

    def __init__(self, directory: Path, settings: SynthesizeConfig) -> None:
        from vllm import LLM

        self.settings = settings
        self.model = LLM(model=str(directory), trust_remote_code=False, max_num_seqs=settings.batch_size)

    def write(self, prompts: list[list[int]], seed: int) -> list[tuple[list[int], bool, float]]:
        """See `Generator`."""
        from vllm import SamplingParams

        s = self.settings
        params = [
            SamplingParams(
                temperature=s.temperature,
                top_k=s.top_k or -1,
                top_p=s.top_p,
                max_tokens=s.max_new_tokens,
                seed=(seed + i) % 2**63,
                logprobs=0,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        outputs = self.model.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [self._written(output.outputs[0]) for output in outputs]

    def _written(self, output: Any) -> tuple[list[int], bool, float]:
        ended = output.finish_reason == "stop"
        steps = list(zip(output.token_ids, output.logprobs, strict=True))
        steps = steps[:-1] if ended else steps
        return [token for token, _ in steps], ended, -sum(found[token].logprob for token, found in steps)
