"""Greedy answers to held-out prompts at every validation, by NeMo-Aligner's own generation."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron import parallel
from nemo_minitron.alignment.runs import keep_done
from nemo_minitron.config.align import AlignConfig
from nemo_minitron.data.chat.encoding import stop_tokens
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.environment import rank

SAMPLES = "samples.jsonl"


def sampling_trainer(model: Any, tokenizer_dir: str, a: AlignConfig, directory: Path, done: int) -> Any:
    """Aligner's SFT trainer; with `align.samples`, one whose validations write RUN/samples.jsonl.

    Args:
        model: Aligner's.
        tokenizer_dir: a Hugging Face directory, with the chat template.
        directory: the run's.
        done: steps that were done when the run began; lines of validations that are repeated go.
    """
    from nemo_aligner.algorithms.supervised import SupervisedTrainer

    path, write = directory / SAMPLES, rank() == 0
    if write:
        keep_done(path, done)
    if not a.samples:
        return SupervisedTrainer
    tokenizer = load_tokenizer(tokenizer_dir)
    stops = stop_tokens(tokenizer, "align.chat_template")
    _generate_greedily(model, tokenizer, stops, a.samples_max_new_tokens)

    class SamplingTrainer(SupervisedTrainer):  # type: ignore[misc]
        """Generates for the first held-out samples; the rest of a validation is Aligner's alone."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.inference_metrics_handler = Samples(self, tokenizer, stops, a, path if write else None)

        def run_generation(self, batch: dict[str, Any]) -> Any:
            with _whole_sequences(self.model):
                output = super().run_generation(batch)
            # Generation leaves its own batch sizes behind, also to the training step after the last batch.
            self.model.finish_validation_step()
            return output

    return SamplingTrainer


def _generate_greedily(model: Any, tokenizer: Any, stops: tuple[int, ...], longest: int) -> None:
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    # NeMo ends at the tokenizer's end-of-text token in any case. It compares texts for an end that is no token of its
    # own, which other tokens may end with too; then the answer is cut afterwards alone.
    end_strings = [tokenizer.decode([stop]) for stop in stops if stop in tokenizer.added_tokens_decoder]
    model.eval()  # the strategy wants it; steps and validations set what they need
    model.set_inference_params(
        # NeMo's own choice of it imports its multimodal models, which need packages that are not here.
        strategy=GPTModelTextGenerationStrategy(model),
        length_params={"min_length": 0, "max_length": longest},
        sampling_params={
            "use_greedy": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "add_BOS": False,  # of texts; prompts are complete tokens here
            "all_probs": False,
            "compute_logprob": False,
            "end_strings": end_strings,
        },
    )


@contextlib.contextmanager
def _whole_sequences(model: Any) -> Iterator[None]:
    """No sequence parallelism: one token cannot be split over the ranks.

    `prepare_for_inference` (nemo_toolkit@2.4.1) turns it off in all layers but the embedding of megatron-core 0.13.
    """
    from megatron.core.transformer.utils import set_model_to_sequence_parallel

    modules = model.get_model_module_list() if model.cfg.sequence_parallel else []
    for module in modules:
        set_model_to_sequence_parallel(module, False)
    try:
        yield
    finally:
        for module in modules:
            set_model_to_sequence_parallel(module, True)


class Samples:
    """In the place of Aligner's `InferenceMetricsHandler`: a JSON line for each of the first samples of a validation.

    `step`, and as texts `prompt`, `answer`, which the model wrote, and `reference`, which the data has; both without
    the token that ends them.

    Args:
        trainer: for its step.
        tokenizer: transformers'.
        stops: the tokens that end an answer.
        path: of the JSONL file on the rank that writes it, else None.
    """

    def __init__(
        self, trainer: Any, tokenizer: Any, stops: tuple[int, ...], a: AlignConfig, path: Path | None
    ) -> None:
        self._trainer, self._tokenizer, self._path = trainer, tokenizer, path
        self._wanted, self._longest = a.samples, a.samples_max_new_tokens
        self._ends = {*stops, tokenizer.eos_token_id}
        self._seen = 0

    def has_metrics(self) -> bool:
        """Whether the next batch's answers are wanted: the same on every rank."""
        return self._seen < self._wanted

    def update(self, batch: dict[str, Any], output: dict[str, Any] | None) -> None:
        """Write a batch's answers; every rank makes this call.

        Args:
            batch: `contexts` and `answers` [b, s], int64, padded; `context_lengths` [b].
            output: of the model's `infer`, with `token_ids`; None on a pipeline's middle stages.
        """
        gathered = parallel.gather_objects(self._lines(batch, output), "dp")
        left = self._wanted - self._seen
        self._seen += len(batch["contexts"]) * parallel.dp_size()
        if self._path:
            lines = [line for of_rank in gathered for line in of_rank][:left]
            with open(self._path, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _lines(self, batch: dict[str, Any], output: dict[str, Any] | None) -> list[dict[str, Any]]:
        if output is None:
            return []
        columns = (batch["contexts"], batch["context_lengths"], batch["answers"])
        lines = []
        for tokens, *row in zip(output["token_ids"], *(c.tolist() for c in columns), strict=True):
            context, length, reference = row
            lines.append(
                {
                    "step": self._trainer.step,
                    "prompt": self._text(context[:length]),
                    "answer": self._text(self._ended(tokens[length : length + self._longest])),
                    "reference": self._text(self._ended(reference)),
                }
            )
        return lines

    def _ended(self, tokens: list[int]) -> list[int]:
        """Without the token that ends an answer and what comes after it."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[:end]

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def compute(self) -> dict[str, float]:
        """No metrics."""
        return {}

    def reset(self) -> None:
        """A validation has ended."""
        self._seen = 0
