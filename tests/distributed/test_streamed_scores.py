"""What is made a layer at a time is what a model in memory gives, by family: scores, losses, students, caches."""

import functools
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.errors import InputError
from nemo_minitron.workflows import preflight
from tests.support import hf_families, ranks, sessions, streamed
from tests.support.hf_families import CONFIGS, CONTEXT, VOCAB_SIZE, make_model
from tests.support.sessions import PATIENCE_S

LLAMA = {
    "model_type": "llama",
    "rope_theta": 100.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 64,
    },
}
SIZES = (
    "hidden_size=24",
    "ffn_hidden_size=20",
    "num_query_groups=2",
    "num_attention_heads=4",
    "num_layers=2",
)
# Mistral's layers are Llama's, and Gemma's embeddings are tied.
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in ("mistral", "qwen2-tied")
]


def source(home: Path, family: str) -> Path:
    """A model with a tokenizer that splits words."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_families.CONFIGS, "llama", LLAMA)
        make_model(home / "hf", family)
    tokenizer = AutoTokenizer.from_pretrained(home / "hf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(home / "hf")
    return home / "hf"


def overrides(home: Path) -> list[str]:
    """Random words, a little of everything."""
    for name, number in (("train", 1), ("valid", 2)):
        words = torch.randint(1, VOCAB_SIZE, (400,), generator=torch.Generator().manual_seed(number))
        (home / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words))
    return [
        *("data=files", f"data.train={home}/train.txt", f"data.valid={home}/valid.txt"),
        *(f"data.seq_length={CONTEXT}", f"data.cache_dir={home}/cache", "eval.samples=5"),
        *("trainer.micro_batch_size=2", "trainer.global_batch_size=2"),
    ]


def pruning(home: Path) -> list[str]:
    """Every axis and the depth."""
    sizes = [f"prune.{size}" for size in SIZES]
    more = ["prune=width", *sizes, "prune.layer_metric=lm_loss", "prune.calibration_samples=7"]
    return [*overrides(home), *more]


def caching(home: Path) -> list[str]:
    """Four shards, the last of two sequences."""
    schedule = ["distill.max_steps=4", "distill.global_batch_size=2", "distill.limit_val_batches=1"]
    return [*overrides(home), *schedule, "cache.train_samples=9"]


def run(asked: list[str], run_dir: Path, killed_at: int | None = None) -> dict[str, Any] | None:
    (found,) = ranks.run_on_ranks(
        1, streamed.pruned, [*asked, f"run_dir={run_dir}"], killed_at, timeout=PATIENCE_S
    )
    return found


@pytest.mark.parametrize("family", ["llama", *OTHERS])
def test_a_layer_at_a_time(tmp_path: Path, family: str) -> None:
    directory, asked = source(tmp_path, family), pruning(tmp_path)
    whole = run([*asked, f"source={directory}"], tmp_path / "whole")
    by_layer = run([*asked, f"source={directory}", "stream=true"], tmp_path / "by layer")
    assert whole is not None
    assert by_layer is not None
    scores, expected = (load_file(tmp_path / name / "scores.safetensors") for name in ("by layer", "whole"))
    assert scores.keys() == {name for name in expected if not name.startswith("blocks/")}
    assert {"layers/lm_loss", "layers/block_influence"} <= scores.keys()
    for name, tensor in scores.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("by layer", "whole")]
    assert plans[0] == plans[1]
    for key in ("lm_loss_nats_before", "lm_loss_nats_after"):
        assert by_layer[key] == pytest.approx(whole[key], rel=1e-5)
    for key in ("eval_tokens", "eval_samples", "calibration_samples", "data_sha256", "params_after"):
        assert by_layer[key] == whole[key]
    assert not list((tmp_path / "by layer").glob(".*"))
    _cached(directory, tmp_path, killed=family == "llama")
    if family == "llama":
        written, exported = str(tmp_path / "whole" / "checkpoint"), str(tmp_path / "exported")
        ranks.run_on_ranks(1, sessions.exported, written, exported, timeout=PATIENCE_S)
        assert streamed.contents(tmp_path / "by layer" / "checkpoint") == streamed.contents(Path(exported))
        _killed(directory, asked, tmp_path, by_layer)


def _killed(directory: Path, asked: list[str], home: Path, expected: dict[str, Any]) -> None:
    """While it loads its third layer."""
    run_dir, again = home / "killed", [*asked, f"source={directory}", "stream=true"]
    assert run(again, run_dir, killed_at=2) is None
    left = sorted(file.name for file in (run_dir / ".states" / "before").glob("*.states"))
    assert left == ["2-train.states", "2-valid.states", "2-without-0.states", "2-without-1.states"]
    found = run(again, run_dir)
    assert found is not None
    assert found["layers_kept"] == 2
    for key in ("lm_loss_nats_before", "lm_loss_nats_after", "target", "source_sha256"):
        assert found[key] == expected[key]
    one, other = (load_file(home / name / "scores.safetensors") for name in ("killed", "by layer"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert streamed.contents(run_dir / "checkpoint") == streamed.contents(home / "by layer" / "checkpoint")


# ---- a teacher's cache ----------------------------------------------------------------------------------------


def cache(asked: list[str], run_dir: Path, *killed_at: int, **how: Any) -> dict[str, Any] | None:
    work = functools.partial(streamed.cached, **how)
    (found,) = ranks.run_on_ranks(
        1, _call, work, [*asked, f"run_dir={run_dir}"], *killed_at, timeout=PATIENCE_S
    )
    return found


def _call(work: Any, *args: Any) -> Any:
    return work(*args)


def _cached(directory: Path, home: Path, *, killed: bool) -> None:
    """The same files, but that nothing was converted of which the manifest could have the identity."""
    asked = [*caching(home), f"teacher={directory}"]
    whole, by_layer = home / "whole cache", home / "cache by layer"
    expected, found = cache(asked, whole), cache([*asked, "stream=true"], by_layer)
    assert expected is not None
    assert found is not None
    same_cache(by_layer, whole)
    assert torch.equal(found["tokens"], expected["tokens"])
    assert found.keys() - expected.keys() == {"stream", "layers_kept", "layer_s", "layer_cpu_s"}
    for key in ("bytes", "shards", "sequences", "data_sha256", "teacher"):
        assert found[key] == expected[key]
    assert not list(by_layer.glob(".*"))
    own_states(directory, TeacherCache(by_layer), found["tokens"])
    if killed:
        other = [*caching(home), f"teacher={home}/whole/checkpoint", f"run_dir={home}/other", "stream=true"]
        with pytest.raises(
            InputError, match="^teacher=.*stream=true reads a .*, this is a NeMo 2 checkpoint"
        ):
            streamed.check("cache_teacher", other)
        _killed_while_caching([*asked, "stream=true"], home, by_layer)
        top_k = [*asked, "cache=top_k", "distill.top_k=5", "distill.temperature=2.0"]
        cache(top_k, home / "whole top")
        cache([*top_k, "stream=true"], home / "top by layer")
        same_cache(home / "top by layer", home / "whole top")


def same_cache(run_dir: Path, expected: Path) -> None:
    """Tensors within 1e-5; the manifest but for the hashes of files and the identity of a converted teacher."""
    one, other = (json.loads((of / "cache" / "manifest.json").read_text()) for of in (run_dir, expected))
    assert one["contents"].pop("teacher_sha256") == other["contents"].pop("teacher_sha256")[:1]
    assert one["contents"] == other["contents"]
    assert one["lm_loss_nats"] == pytest.approx(other["lm_loss_nats"], rel=1e-5)
    files = one["shards"] + ([one["head"]] if one["head"] else [])
    assert len(one["shards"]) == len(other["shards"]) == 4
    for file in files:
        ours, theirs = (load_file(of / "cache" / file["name"]) for of in (run_dir, expected))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    TeacherCache(run_dir).verify()


def own_states(directory: Path, cache: TeacherCache, tokens: torch.Tensor) -> None:
    """What is kept is what enters the output layer in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model.model(tokens).last_hidden_state
    torch.testing.assert_close(cache.hidden(tokens).transpose(0, 1), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(cache.head(slice(None)), model.lm_head.weight)


def _killed_while_caching(asked: list[str], home: Path, expected: Path) -> None:
    """At three layers, the last time between two shards; states that are missing are made again."""
    run_dir = home / "killed cache"
    assert cache(asked, run_dir, 2) is None  # the teacher's loss, its third layer
    assert cache(asked, run_dir, 2 + 1) is None  # the cache, its second
    states = run_dir / ".states" / "cache"
    left = sorted(file.name for file in states.glob("*.states"))
    assert left == [f"1-shard-{number}.states" for number in range(4)]
    (states / left[2]).unlink()
    assert cache(asked, run_dir, killed_in=1) is None
    found = cache(asked, run_dir)
    assert found is not None
    assert (found["layers_kept"], found["shards_kept"], len(found["layer_s"])) == (3, 1, 1)
    assert streamed.contents(run_dir / "cache") == streamed.contents(expected / "cache")


def test_a_teacher_that_guesses_writes_no_cache(tmp_path: Path) -> None:
    directory = source(tmp_path, "llama")
    asked = [*caching(tmp_path), f"teacher={directory}", "stream=true"]
    with pytest.raises(InputError, match=r"^teacher=.*: its LM loss is .* nats on the held-out data, where"):
        cache(asked, tmp_path / "run", guesses=False)
    assert [file.name for file in (tmp_path / "run" / "cache").iterdir()] == ["plan.json"]


def test_a_disk_without_room_for_the_states_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = source(tmp_path, "llama")
    own = ["stream=true", f"run_dir={tmp_path}/run"]
    arch = find_source(directory).architecture
    # Before a layer and after it, float32: the calibration samples as a whole and without each layer, and the others.
    states = 2 * (7 * (1 + arch.num_layers) + 5) * CONTEXT * arch.hidden_size * 4
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, (64 << 20) + states))
    with pytest.raises(
        InputError, match=rf"^run_dir=.*: its disk has room for .* residual states {states:,}$"
    ):
        streamed.check("prune", [*pruning(tmp_path), f"source={directory}", *own])
    # Of eleven sequences, before the last layer; after it they are the cache, with their names and the output layer.
    states = 11 * CONTEXT * arch.hidden_size * 4
    cache = states + 11 * 16 + VOCAB_SIZE * arch.hidden_size * 4
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, (16 << 20) + states))
    says = f"{states:,}, the cache after it {cache:,}, files beside them 16,777,216"
    with pytest.raises(InputError, match=rf"^run_dir=.*: its disk has room for .* layer {says}$"):
        streamed.check("cache_teacher", [*caching(tmp_path), f"teacher={directory}", *own])
    assert not (tmp_path / "run").exists()


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    """Residual states lie on the disk as the model has them."""
    directory = source(tmp_path, "llama")
    in_bf16 = "trainer.precision=bf16-mixed"
    asked = [*pruning(tmp_path), f"source={directory}", in_bf16]
    whole, by_layer = run(asked, tmp_path / "whole"), run([*asked, "stream=true"], tmp_path / "by layer")
    assert whole is not None
    assert by_layer is not None
    scores, expected = (load_file(tmp_path / name / "scores.safetensors") for name in ("by layer", "whole"))
    for name, tensor in scores.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert by_layer["lm_loss_nats_before"] == pytest.approx(whole["lm_loss_nats_before"], rel=1e-5)
    assert find_source(tmp_path / "by layer" / "checkpoint").dtype == "float32"
    asked = [*caching(tmp_path), f"teacher={directory}", in_bf16]
    cache(asked, tmp_path / "whole cache")
    states = tmp_path / "cache by layer" / ".states" / "cache"
    assert cache([*asked, "stream=true"], states.parents[1], 4 + 1) is None  # the loss, and a layer
    size = streamed.PER_SHARD * CONTEXT * find_source(directory).architecture.hidden_size * 2
    assert (states / "1-shard-0.states").stat().st_size == size
    cache([*asked, "stream=true"], states.parents[1])
    same_cache(states.parents[1], tmp_path / "whole cache")
    assert TeacherCache(states.parents[1]).contents.dtype == "bfloat16"
