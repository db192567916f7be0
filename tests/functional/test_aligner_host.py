"""NeMo-Aligner's SFT without CUDA, in processes of its own: its stand-ins stay for a process's life."""

import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "aligner_sft_script.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for hosts without CUDA")


def run(*arguments: object, limit_s: int = 240) -> str:
    """Standard output of a Python process."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def sft(directory: Path, steps: int) -> list[float]:
    out = run(SCRIPT, directory, "--steps", steps)
    found = re.search(r"^losses: (\[.*\])$", out, re.MULTILINE)
    assert found, out[-2000:]
    return json.loads(found.group(1))


def test_sft_trains_and_saves(tmp_path: Path) -> None:
    losses = sft(tmp_path, steps=3)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    # An untrained model of 304 tokens knows nothing: ln 304 = 5.72 nats.
    assert abs(losses[0] - math.log(304)) < 0.3
    assert losses[-1] < losses[0] - 0.3
    (saved,) = tmp_path.rglob("*.nemo")
    with tarfile.open(saved) as archive:
        names = archive.getnames()
    assert "./model_config.yaml" in names
    assert "./model_weights/metadata.json" in names


@pytest.mark.slow
def test_a_resumed_run_loses_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Weights, the optimizer's moments and step, the schedule and the data's order come back with a checkpoint."""
    straight = sft(tmp_path / "straight", steps=6)
    resumed = sft(tmp_path / "resumed", steps=3) + sft(tmp_path / "resumed", steps=6)
    assert resumed == pytest.approx(straight, rel=1e-6)


STAND_INS = """
import torch
from nemo_minitron import cpu_compat
from nemo_minitron.errors import InputError
assert cpu_compat.prepare_aligner()
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
from nemo.core.optim.optimizers import get_optimizer
from nemo_minitron.cpu_compat.aligner import _AmpC

try:
    megatron_gpt_model.get_specs("megatron_gemma2")
except InputError as error:
    assert "megatron_gemma2" in str(error) and "te_gpt" in str(error)
else:
    raise SystemExit("a layer spec of Transformer Engine was accepted")

grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [12.0]])]
assert _AmpC.multi_tensor_l2norm(grads).item() == 13.0

def train(optimizer, weights, steps):
    for step in steps:
        for weight in weights:
            weight.grad = torch.full_like(weight, float(step + 1)) * weight.detach()
        optimizer.step()

def weights():
    return [torch.nn.Parameter(torch.arange(4.0)), torch.nn.Parameter(torch.ones(2, 3))]

settings = dict(lr=0.1, weight_decay=0.1)
ours, theirs = weights(), weights()
theirs_optimizer = torch.optim.AdamW(theirs, **settings)
train(theirs_optimizer, theirs, range(4))
before = get_optimizer("sharded_adamw")(ours, **settings)
assert "step" not in before.state_dict()["param_groups"][0]
train(before, ours, range(2))
saved = before.state_dict()
assert saved["param_groups"][0]["step"] == 2
for key, values in saved["state"].items():
    assert all(value.shape == ours[key].shape for value in values.values()), values
after = get_optimizer("sharded_adamw")(ours, **settings)
after.load_state_dict(saved)
train(after, ours, range(2, 4))
for mine, reference in zip(ours, theirs, strict=True):
    torch.testing.assert_close(mine, reference, rtol=0, atol=0)
"""


def test_stand_ins_say_what_they_refuse_and_compute_what_they_replace() -> None:
    """The specs' refusal, the norm of gradients, and an optimizer that goes on as torch's own AdamW would have."""
    run("-c", STAND_INS)
