"""Models of families that are not converted: opened without remote code, measured beside transformers' own results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nemo_minitron.checkpoints.any_family import find_any, is_of_another_family, load_directory
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.benchmarks.backend import BackendLM
from nemo_minitron.evaluation.transformers_text import transformers_figures
from tests.support.other_families import CONTEXT, GEMMA_2, PHI, VOCAB_SIZE, make_model

FAMILIES = {"gemma2": GEMMA_2, "phi": PHI}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    home = tmp_path_factory.mktemp("families")
    return {name: (home / name, make_model(home / name, values)) for name, values in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_counted_without_weights(made: dict[str, tuple[Path, Any]], name: str) -> None:
    directory, model = made[name]
    found = find_any(directory)
    assert is_of_another_family(directory)
    assert (found.model_type, found.vocab_size, found.seq_length) == (name, VOCAB_SIZE, CONTEXT)
    assert found.parameters == model.num_parameters()
    # Gemma 2 ties its output layer; Phi's is one of its own, with a bias.
    table = VOCAB_SIZE * 32
    assert found.non_embedding_parameters == found.parameters - (
        table if name == "gemma2" else 2 * table + VOCAB_SIZE
    )
    loaded = load_directory(directory, "float32").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def rewritten(directory: Path, name: str, **changes: Any) -> None:
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def lacking_a_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight is missing": (lacking_a_weight, "the weight files lack model.norm.weight"),
    "other sizes": (lambda d: rewritten(d, "config.json", intermediate_size=64), "has shape"),
    "no such family": (
        lambda d: rewritten(d, "config.json", model_type="nowhere", auto_map={"AutoConfig": "evil.Evil"}),
        "without remote code",
    ),
    "quantised": (
        lambda d: rewritten(d, "config.json", quantization_config={"bits": 4}),
        "quantization_config",
    ),
    "layers": (lambda d: rewritten(d, "config.json", num_hidden_layers=10**6), "1000000 layers"),
    "nonsense": (lambda d: rewritten(d, "config.json", hidden_size="many"), "does not take its config.json"),
    "no tokenizer": (lambda d: (d / "tokenizer_config.json").unlink(), "no tokenizer"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_whole_is_refused_in_a_line(tmp_path: Path, how: str) -> None:
    damage, part = REFUSED[how]
    make_model(tmp_path, GEMMA_2)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    damage(tmp_path)
    with pytest.raises(InputError, match=part) as caught:
        find_any(tmp_path, "models")
    assert str(caught.value).startswith(f"models={tmp_path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_backend_keeps_its_answers_and_they_are_the_harness_s_own(
    made: dict[str, tuple[Path, Any]], name: str, tmp_path: Path
) -> None:
    from nemo_minitron.data.tokenizer import load_tokenizer

    directory, model = made[name]
    pairs = [(f"the model {n}", f" says {n * n}") for n in range(9)] + [("", "of it")]
    scored = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    settings = {"until": ["7"], "do_sample": False, "max_gen_toks": 6}
    written = [Instance("generate_until", {}, (text, settings), 0) for text, _ in pairs[:3]]
    plain = HFLM(pretrained=model, tokenizer=load_tokenizer(directory), batch_size=4, max_length=CONTEXT)
    counts: list[int] = []

    def opened() -> BackendLM:
        answers = Answers(tmp_path / "answers.jsonl")
        return BackendLM(model, load_tokenizer(directory), CONTEXT, 2, answers, counts.append, lambda _: None)

    first = opened()
    for _ in range(2):
        values = first.loglikelihood(scored)
        expected = plain.loglikelihood(scored, disable_tqdm=True)
        np.testing.assert_allclose([v for v, _ in values], [v for v, _ in expected], atol=1e-4)
        assert [best for _, best in values] == [best for _, best in expected]
        assert first.generate_until(written) == plain.generate_until(written, disable_tqdm=True)
        first = opened()  # the second time everything is known
    assert counts == [10, 3, 0, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_figures_of_text_are_those_of_float64(made: dict[str, tuple[Path, Any]], name: str) -> None:
    _, model = made[name]
    tokens = torch.randint(2, VOCAB_SIZE, (5, 41), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(5, 40)
    mask[1, 10:] = 0
    items = [
        {"tokens": t[:-1], "labels": t[1:], "position_ids": torch.arange(40), "loss_mask": m}
        for t, m in zip(tokens, mask, strict=True)
    ]
    found = transformers_figures(model, items, 5, batch_size=2)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits.double()
    losses = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0] * mask
    assert found.tokens == int(mask.sum())
    assert found.nats == pytest.approx(float(losses.sum() / mask.sum()), rel=1e-6)
    right = ((logits.argmax(-1) == tokens[:, 1:]) * mask).sum() / mask.sum()
    assert found.accuracy == pytest.approx(float(right))
    np.testing.assert_allclose([nats for nats, _ in found.sequences], losses.sum(1), rtol=1e-5)


def test_soft_capping_is_computed(tmp_path: Path) -> None:
    """torch's fused attention, transformers' choice, would leave it out."""
    from transformers import AutoModelForCausalLM

    make_model(tmp_path, GEMMA_2, attn_logit_softcapping=0.05, initializer_range=2.0)
    eager, fused = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name) for name in ("eager", "sdpa")
    )
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        found, right, wrong = (m(tokens).logits for m in (load_directory(tmp_path, "float32"), eager, fused))
    assert torch.equal(found, right)
    assert (right - wrong).abs().max() > 1e-3
