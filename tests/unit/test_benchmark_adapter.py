"""The harness's language model of `evaluation.benchmarks.adapter` beside its own `hf` backend, on the same weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_minitron.errors import FailedRun
from nemo_minitron.evaluation.benchmarks.adapter import ShardedLM
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.multiple_choice import Request

VOCAB_SIZE, CONTEXT = 40, 24


class Transformers:
    """Answers one request at a time, by transformers; `asked` counts."""

    max_length, slice_requests = CONTEXT, 3

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, 0

    def log_likelihoods(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        self.asked += len(requests)
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> tuple[float, bool]:
        with torch.no_grad():
            logits = self.model(torch.tensor([request.tokens[:-1]])).logits[0, -request.scored :]
        labels = torch.tensor(request.tokens[-request.scored :])
        chosen = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
        return float(chosen), bool((logits.argmax(-1) == labels).all())

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: list[str]
    ) -> list[list[int]]:
        self.asked += len(prompts)
        given = [torch.tensor([list(prompt)]) for prompt in prompts]
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
        return [self.model.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in given]


@pytest.fixture(scope="module")
def toy() -> tuple[Any, Any]:
    """A random model, and a tokenizer of words that begins texts with a token of its own."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, initializer_range=0.4, **sizes)
    ).eval()
    words = {"<end>": 0, "<begin>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", bos_token="<begin>", pad_token="<end>"
    )
    return model, tokenizer


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def hf(toy: tuple[Any, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = toy
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")


def test_log_likelihoods_are_those_of_the_hf_backend(toy: tuple[Any, Any]) -> None:
    """Also of nothing before, of what the context does not hold, and of choices that differ in one token."""
    long = words(*(2 + i % 30 for i in range(CONTEXT + 9)))
    pairs = [(words(5, 9, 3), " " + words(4)), (words(5, 9, 3), " " + words(6)), ("", words(8, 9, 30))]
    pairs += [(long, " " + words(7, 5)), ("w5 ", words(11, 12))]
    requests = [asked("loglikelihood", *pair) for pair in pairs]
    ours = ShardedLM(Transformers(toy[0]), toy[1], Answers(None))
    reference = hf(toy)
    found, expected = ours.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True)
    assert [best for _, best in found] == [best for _, best in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert ours.cut == 1
    texts = [asked("loglikelihood_rolling", long), asked("loglikelihood_rolling", words(3, 4))]
    rolled = reference.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolled, abs=1e-4)


def test_written_answers_are_those_of_the_hf_backend(toy: tuple[Any, Any]) -> None:
    long = words(*(2 + i % 30 for i in range(CONTEXT + 9)))
    settings = {"until": ["w7"], "do_sample": False, "max_gen_toks": 6}
    requests = [asked("generate_until", words(*row), settings) for row in ([3], [9, 8], [20, 21, 22])]
    requests += [asked("generate_until", long, settings)]
    requests += [asked("generate_until", words(9, 8), {**settings, "max_gen_toks": 3})]
    ours = ShardedLM(Transformers(toy[0]), toy[1], Answers(None))
    assert ours.generate_until(requests) == hf(toy).generate_until(requests, disable_tqdm=True)
    with pytest.raises(FailedRun, match="greedy"):
        ours.generate_until([asked("generate_until", "w3", {"do_sample": True, "temperature": 1.0})])


def test_what_was_answered_is_not_asked_again(toy: tuple[Any, Any], tmp_path: Path) -> None:
    """Not by a later process either; of a line that a kill cut short nothing is taken."""
    file = tmp_path / "answers.jsonl"
    requests = [asked("loglikelihood", words(5, 9, 3), f" w{n}") for n in (4, 6, 4, 8, 10)]
    first = ShardedLM(Transformers(toy[0]), toy[1], Answers(file))
    found = first.loglikelihood(requests)
    assert first.model.asked == 4
    assert found[0] == found[2]
    file.write_text(file.read_text()[:-20])
    again = ShardedLM(Transformers(toy[0]), toy[1], Answers(file))
    assert again.loglikelihood(requests) == found
    assert again.model.asked == 1
    assert ShardedLM(Transformers(toy[0]), toy[1], Answers(file)).loglikelihood(requests) == found
