"""Scores and losses made a layer at a time are those of a model in memory, for every family; so is the student."""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoints.source import find_source
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
    """Random words, a little of everything, every axis and the depth."""
    for name, number in (("train", 1), ("valid", 2)):
        words = torch.randint(1, VOCAB_SIZE, (400,), generator=torch.Generator().manual_seed(number))
        (home / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words))
    return [
        *("data=files", f"data.train={home}/train.txt", f"data.valid={home}/valid.txt"),
        *(f"data.seq_length={CONTEXT}", f"data.cache_dir={home}/cache", "eval.samples=5"),
        *("trainer.micro_batch_size=2", "trainer.global_batch_size=2", "prune.calibration_samples=7"),
        *("prune=width", *(f"prune.{size}" for size in SIZES), "prune.layer_metric=lm_loss"),
    ]


def run(asked: list[str], run_dir: Path, killed_at: int | None = None) -> dict[str, Any] | None:
    (found,) = ranks.run_on_ranks(
        1, streamed.pruned, [*asked, f"run_dir={run_dir}"], killed_at, timeout=PATIENCE_S
    )
    return found


@pytest.mark.parametrize("family", ["llama", *OTHERS])
def test_a_layer_at_a_time(tmp_path: Path, family: str) -> None:
    directory, asked = source(tmp_path, family), overrides(tmp_path)
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


def test_a_disk_without_room_for_the_states_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = source(tmp_path, "llama")
    asked = [*overrides(tmp_path), f"source={directory}", "stream=true", f"run_dir={tmp_path}/run"]
    arch = find_source(directory).architecture
    # Before a layer and after it, float32: the calibration samples as a whole and without each layer, and the others.
    states = 2 * (7 * (1 + arch.num_layers) + 5) * CONTEXT * arch.hidden_size * 4
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, (64 << 20) + states))
    with pytest.raises(
        InputError, match=rf"^run_dir=.*: its disk has room for .* residual states {states:,}$"
    ):
        streamed.check(asked)
    assert not (tmp_path / "run").exists()


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    """Residual states lie on the disk as the model has them."""
    directory = source(tmp_path, "llama")
    asked = [*overrides(tmp_path), f"source={directory}", "trainer.precision=bf16-mixed"]
    whole, by_layer = run(asked, tmp_path / "whole"), run([*asked, "stream=true"], tmp_path / "by layer")
    assert whole is not None
    assert by_layer is not None
    scores, expected = (load_file(tmp_path / name / "scores.safetensors") for name in ("by layer", "whole"))
    for name, tensor in scores.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-2, atol=2e-2)
    assert by_layer["lm_loss_nats_before"] == pytest.approx(whole["lm_loss_nats_before"], rel=1e-2)
    assert find_source(tmp_path / "by layer" / "checkpoint").dtype == "float32"
