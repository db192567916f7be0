"""Every family's checkpoint from NeMo 2 into NeMo-Aligner's model and back, against transformers' own models."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import hf_families, ranks, sessions
from tests.support.hf_families import CONFIGS, CONTEXT, VOCAB_SIZE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240
# Frequencies so low that the scaling changes them within the few tokens here.
LLAMA31 = {
    "model_type": "llama",
    "head_dim": 16,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 4096,
    },
}
# Two in half precision: what is trained has the dtype of what it began with.
HALVES = {"llama31-float16": torch.float16, "qwen2-bfloat16": torch.bfloat16}
FAMILIES = [*CONFIGS, "llama31", *HALVES]


@dataclass(frozen=True)
class Models:
    """By family: NeMo 2 directories, and what transformers makes of tokens [n, s]."""

    home: Path
    nemo: dict[str, str]
    logits: dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from transformers import AutoModelForCausalLM

    home = tmp_path_factory.mktemp("families")
    tokens = torch.randint(VOCAB_SIZE, (4, CONTEXT), generator=torch.Generator().manual_seed(4))
    save_file({"tokens": tokens}, home / "tokens.safetensors")
    nemo, logits = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_families.CONFIGS, "llama31", LLAMA31)
        for name in FAMILIES:
            model = hf_families.make_model(home / name, re.sub("-b?float16", "", name))
            if name in HALVES:
                model.to(HALVES[name]).save_pretrained(home / name)
                # Read again: the frequencies of the model itself were rounded too.
                model = AutoModelForCausalLM.from_pretrained(home / name, attn_implementation="eager").eval()
            logits[name] = logits_of(model, tokens)
            (nemo[name],) = ranks.run_on_ranks(
                1, sessions.imported, str(home / name), str(home / "cache"), timeout=PATIENCE_S
            )
    return Models(home, nemo, logits)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def through_aligner(models: Models, tp: int) -> Path:
    output = models.home / f"tp{tp}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp)),
            str(ROOT / "tests" / "support" / "aligner_logits_script.py"),
            *(str(tp), str(models.home / "tokens.safetensors"), str(output), *models.nemo.values()),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_at_every_hop(models: Models, tp: int) -> None:
    """NeMo 2 to Aligner; saved from there to NeMo 2; exported to Hugging Face. Within 1e-5 of the largest logit."""
    from transformers import AutoModelForCausalLM

    output = through_aligner(models, tp)
    tokens = load_file(models.home / "tokens.safetensors")["tokens"]
    for number, name in enumerate(FAMILIES):
        expected = models.logits[name]
        close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
        found = load_file(output / str(number) / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, expected, **close, msg=lambda m, name=name: f"{name}: {m}")
        checkpoint, exported = output / str(number) / "checkpoint", output / str(number) / "hf"
        ranks.run_on_ranks(1, sessions.exported, str(checkpoint), str(exported), timeout=PATIENCE_S)
        back = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
        torch.testing.assert_close(logits_of(back, tokens), expected, rtol=0, atol=0)
        dtype = HALVES.get(name, torch.float32)
        assert {w.dtype for w in load_file(exported / "model.safetensors").values()} == {dtype}
        said = yaml.safe_load((checkpoint / "context" / "model.yaml").read_text())["config"]
        assert (said["fp16"], said["bf16"]) == (dtype == torch.float16, dtype == torch.bfloat16)
