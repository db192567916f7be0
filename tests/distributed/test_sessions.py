"""Checkpoints under NeMo: to and from Hugging Face, and opened and saved under every layout. The independent
reference is transformers' LlamaForCausalLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import ranks, sessions
from tests.support.sessions import PATIENCE_S

VOCAB_SIZE, CONTEXT = 64, 32
LAYOUTS = [
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 1},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"data_parallel_size": 2},
]
LAYOUT_IDS = ["tp2", "pp2", "pp2-uneven", "tp2-sp", "dp2"]


@dataclass(frozen=True)
class Example:
    """A random Hugging Face model, its NeMo 2 form, and what transformers makes of some tokens [n, s + 1]."""

    huggingface: Path
    nemo: str
    tokens: Tensor
    logits: Tensor
    loss: float


def make_huggingface(directory: Path, **changes: Any) -> Any:
    """As after pruning: head_dim is not hidden_size / heads. Weights large enough that logits differ much."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    words = {"<eod>": 0, **{f"w{i}": i for i in range(1, model.config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eod>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eod>", bos_token="<eod>", unk_token="<eod>"
    ).save_pretrained(directory)
    return model


def example(directory: Path, **changes: Any) -> Example:
    model = make_huggingface(directory / "hf", **changes)
    tokens = torch.randint(VOCAB_SIZE, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    (nemo,) = ranks.run_on_ranks(
        1, sessions.imported, str(directory / "hf"), str(directory / "cache"), timeout=PATIENCE_S
    )
    return Example(directory / "hf", nemo, tokens, logits, loss)


@pytest.fixture(scope="module")
def pruned_like(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return example(tmp_path_factory.mktemp("pruned-like"))


# None of the numbers is Llama 3.1's; within 32 tokens one of the four frequencies is kept, one blended, two are scaled.
SCALED = {
    "tie_word_embeddings": True,
    "rope_theta": 100.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 64,
    },
}


def check_round_trip(run_on_ranks: Any, e: Example, output: Path) -> None:
    from transformers import LlamaForCausalLM

    (logits,) = run_on_ranks(1, sessions.logits_of, e.nemo, e.tokens[:, :-1], timeout=PATIENCE_S)
    torch.testing.assert_close(logits, e.logits, rtol=1e-4, atol=1e-4)
    run_on_ranks(1, sessions.exported, e.nemo, str(output), timeout=PATIENCE_S)
    again = LlamaForCausalLM.from_pretrained(output, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(e.tokens[:, :-1]).logits, e.logits, rtol=1e-5, atol=1e-5)
    before, after = (LlamaForCausalLM.from_pretrained(d).state_dict() for d in (e.huggingface, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_hugging_face_to_nemo_and_back(run_on_ranks: Any, pruned_like: Example, tmp_path: Path) -> None:
    check_round_trip(run_on_ranks, pruned_like, tmp_path / "again")


def test_tied_embeddings_and_rotary_scaling_with_factors_of_its_own(
    run_on_ranks: Any, tmp_path: Path
) -> None:
    check_round_trip(run_on_ranks, example(tmp_path, **SCALED), tmp_path / "again")


def test_a_conversion_is_made_once(run_on_ranks: Any, pruned_like: Example) -> None:
    cache = Path(pruned_like.nemo).parents[1]
    before = sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*"))
    (again,) = run_on_ranks(
        1, sessions.imported, str(pruned_like.huggingface), str(cache), timeout=PATIENCE_S
    )
    assert again == pruned_like.nemo
    assert sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*")) == before


@pytest.mark.parametrize("sizes", LAYOUTS, ids=LAYOUT_IDS)
def test_opened_under_each_layout_and_saved_for_another(
    run_on_ranks: Any, pruned_like: Example, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    """The loss is transformers' own; what two ranks save, one process opens."""
    losses = run_on_ranks(
        2, sessions.loss_under, pruned_like.nemo, pruned_like.tokens, sizes, timeout=PATIENCE_S
    )
    assert losses == pytest.approx([pruned_like.loss] * 2, rel=1e-4)
    output = str(tmp_path / "saved")
    run_on_ranks(2, sessions.saved_again, pruned_like.nemo, output, sizes, timeout=PATIENCE_S)
    (logits,) = run_on_ranks(1, sessions.logits_of, output, pruned_like.tokens[:, :-1], timeout=PATIENCE_S)
    torch.testing.assert_close(logits, pruned_like.logits, rtol=1e-4, atol=1e-4)


def test_no_rank_writes_before_rank_0_has_removed_what_a_kill_left(
    run_on_ranks: Any, pruned_like: Example, tmp_path: Path
) -> None:
    output, sizes = str(tmp_path / "saved"), {"data_parallel_size": 2}
    call = (sessions.saved_while_rank_0_tidies, pruned_like.nemo, output, sizes, 1.0)
    run_on_ranks(2, *call, timeout=PATIENCE_S)
