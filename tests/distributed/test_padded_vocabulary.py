"""A vocabulary that the tensor-parallel ranks do not divide: nothing of its padding is ever seen. References are
transformers' LlamaForCausalLM and one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.checkpoints.source import find_source
from tests.distributed.test_sessions import Example, example
from tests.support import sessions
from tests.support.ranks import ROOT, layout
from tests.support.sessions import PATIENCE_S

VOCAB_SIZE = 67
SIZES = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "num_key_value_heads": 4}
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp4": {"tensor_model_parallel_size": 4},
}
RANKS = {"tp2": 2, "tp2-sp": 2, "tp2-pp2": 4, "tp4": 4}
# Four ranks import NeMo four times.
FOUR = [pytest.param(name, marks=pytest.mark.slow) for name in ("tp2-pp2", "tp4")]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def odd(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Example:
    made = example(tmp_path_factory.mktemp("odd"), tie_word_embeddings=request.param, **SIZES)
    # The last ids too: those of the rank that holds the padding.
    made.tokens[0, 5:8] = torch.tensor([66, 64, 66])
    return made


def model_of(directory: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def seen(checkpoint: str, tokens: Tensor, sizes: dict[str, Any]) -> dict[str, Any]:
    """A model's loss over tokens [n, s + 1] in nats, and the gradients of its tables, whole, with their padding."""
    session = sessions.open_session(checkpoint, **sizes)
    from nemo_minitron.evaluation.lm_loss import lm_loss

    data = sessions.samples(tokens)
    found = {"loss": lm_loss(session.chunks, data, len(data), micro_batch_size=2).nats}
    if parallel.pp_size() > 1:
        return found
    (model,) = session.chunks
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
    for name in ("embedding.word_embeddings", "output_layer"):
        weight = getattr(model.get_submodule(name), "weight", None)
        if weight is not None:
            found[f"{name}.gradient"] = torch.cat(parallel.all_gather_tp(weight.grad))
            found[name] = torch.cat(parallel.all_gather_tp(weight.detach()))
    return found


def expected(e: Example) -> dict[str, Any]:
    """The same from transformers."""
    model = model_of(e.huggingface)
    logits = model(e.tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), e.tokens[:, 1:].flatten())
    loss.backward()
    found = {"loss": loss.item()}
    for name, layer in (
        ("embedding.word_embeddings", model.model.embed_tokens),
        ("output_layer", model.lm_head),
    ):
        found |= {f"{name}.gradient": layer.weight.grad, name: layer.weight.detach()}
    return found


def stored(checkpoint: str) -> dict[str, Tensor]:
    """The tables as any reader of torch's distributed checkpoints finds them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(f"{checkpoint}/weights")
    found = {
        name: torch.empty(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(("module.embedding", "module.output_layer.weight"))
    }
    load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix("module.").removesuffix(".weight"): t for name, t in found.items()}


@pytest.mark.parametrize("name", ["tp2", "tp2-sp", *FOUR])
def test_losses_and_gradients_are_those_of_the_true_rows(run_on_ranks: Any, odd: Example, name: str) -> None:
    wanted = expected(odd)
    for found in run_on_ranks(RANKS[name], seen, odd.nemo, odd.tokens, LAYOUTS[name], timeout=PATIENCE_S):
        assert found.pop("loss") == pytest.approx(wanted["loss"], rel=1e-5)
        for key, value in found.items():
            assert len(value) == 68
            torch.testing.assert_close(value[:VOCAB_SIZE], wanted[key], rtol=1e-4, atol=1e-5)
            assert not value[VOCAB_SIZE:].any()


@pytest.mark.parametrize("name", ["tp2", FOUR[1]])
def test_what_one_layout_saves_another_reads(
    run_on_ranks: Any, odd: Example, tmp_path: Path, name: str
) -> None:
    """Saved under tensor parallelism, it is the same to one process, to Hugging Face and to other ranks."""
    saved, exported = str(tmp_path / "saved"), str(tmp_path / "exported")
    run_on_ranks(RANKS[name], sessions.saved_again, odd.nemo, saved, LAYOUTS[name], timeout=PATIENCE_S)
    assert find_source(saved).architecture == find_source(odd.nemo).architecture
    for key, table in stored(saved).items():
        torch.testing.assert_close(table, expected(odd)[key], rtol=0, atol=0)
    run_on_ranks(1, sessions.exported, saved, exported, timeout=PATIENCE_S)
    before, after = (model_of(Path(d)).state_dict() for d in (odd.huggingface, exported))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    other = {"pipeline_model_parallel_size": 2} if name == "tp2" else LAYOUTS["tp2"]
    losses = run_on_ranks(2, sessions.loss_under, saved, odd.tokens, other, timeout=PATIENCE_S)
    assert losses == pytest.approx([expected(odd)["loss"]] * len(losses), rel=1e-5)


PROMPTS = [[3, 17, 66, 5], [64, 2]]
NEW = 8


def written(checkpoint: str, sizes: dict[str, Any], *choice: str) -> list[list[int]]:
    """What Megatron's text generation adds to the prompts."""
    from hydra import compose, initialize_config_dir

    from nemo_minitron.config.recipes import SynthesizeRecipe, parse
    from nemo_minitron.nemo.text_generation import MegatronGenerator

    layout(sizes.get("tensor_model_parallel_size", 1), sizes.get("pipeline_model_parallel_size", 1))
    with sessions._launched(), initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        named = [f"trainer.{name}={value}" for name, value in sizes.items()]
        more = [
            "run_dir=none",
            "teacher=none",
            "synthesize.batch_size=2",
            f"synthesize.max_new_tokens={NEW}",
            *choice,
        ]
        recipe = parse(SynthesizeRecipe, compose("synthesize", overrides=[*more, *named]))
        writer = MegatronGenerator(recipe, find_source(checkpoint), 4 + NEW)
        return [new for new, _, _ in writer.write(PROMPTS, 7)]


def greedy(directory: Path) -> list[list[int]]:
    """transformers' most probable continuations; 0 ends a text."""
    model, found = model_of(directory), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )
        new = out[0, len(prompt) :].tolist()
        found.append(new[: new.index(0)] if 0 in new else new)
    return found


@pytest.mark.parametrize("name", ["tp2", FOUR[0]])
def test_texts_are_those_of_one_process(run_on_ranks: Any, odd: Example, name: str) -> None:
    """Drawn ones too: with a column more, the same seed would draw others."""
    for choice in (["synthesize.top_k=1"], ["synthesize.temperature=1", "synthesize.top_p=1"]):
        (alone,) = run_on_ranks(1, written, odd.nemo, {}, *choice, timeout=PATIENCE_S)
        found = run_on_ranks(RANKS[name], written, odd.nemo, LAYOUTS[name], *choice, timeout=PATIENCE_S)
        assert found == [alone] * RANKS[name]
        if "synthesize.top_k=1" in choice:
            assert alone == greedy(odd.huggingface)


def scored_and_pruned(
    checkpoint: str, tokens: Tensor, sizes: dict[str, Any], plan: Any, output: str
) -> dict[str, Tensor]:
    """Importance of all units and layers; then the pruned model is saved."""
    from nemo_minitron.evaluation.lm_loss import lm_loss
    from nemo_minitron.nemo.importance_callback import ImportanceCallback
    from nemo_minitron.nemo.prune_transform import prune_model

    session = sessions.open_session(checkpoint, **sizes)
    callback = ImportanceCallback(block_lengths=[1], source_sha256="", data_sha256="")
    callback.attach(session.chunks)
    data = sessions.samples(tokens)
    lm_loss(session.chunks, data, len(data), micro_batch_size=2)
    scores = callback.finish(session.model.config)
    prune_model(session.model, session.chunks, plan)
    with sessions._launched():
        session.save(Path(output))
    return scores.tensors


def test_scores_and_students_are_those_of_one_process(
    run_on_ranks: Any, odd: Example, tmp_path: Path
) -> None:
    from nemo_minitron.pruning import make_plan, resolve_target

    arch = find_source(odd.nemo).architecture
    sizes = {"hidden_size": 24, "ffn_hidden_size": 32}
    plan = make_plan(arch, resolve_target(arch, sizes), importance="random", seed=3, source_sha256="")
    found = {
        name: run_on_ranks(
            count, scored_and_pruned, odd.nemo, odd.tokens, under, plan, str(tmp_path / name),
            timeout=PATIENCE_S,
        )[0]
        for name, count, under in (("alone", 1, {}), ("tp2", 2, LAYOUTS["tp2"]))
    }  # fmt: skip
    assert found["tp2"].keys() == found["alone"].keys()
    for key, scores in found["alone"].items():
        torch.testing.assert_close(found["tp2"][key], scores, rtol=1e-4, atol=1e-5)
    alone, tp2 = (stored(str(tmp_path / name)) for name in ("alone", "tp2"))
    assert alone.keys() == tp2.keys()
    assert all(torch.equal(alone[key], tp2[key]) for key in alone)
    assert find_source(tmp_path / "tp2").architecture == plan.target
