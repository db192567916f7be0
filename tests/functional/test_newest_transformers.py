"""What is exported, opened by the newest transformers of each major version in an environment of its own: the same
distributions as the pinned one's. What that one saves is read again: the same model."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoints.families import FAMILIES, config_of
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.export import generation, huggingface
from nemo_minitron.export.tensors import Weights
from tests.support.stacked_weights import of_family, saved, stacked

VERSIONS = ("4.57.6", "5.24.0")
TOKENIZER = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
TEXT = "def f(x1):\n    return 12345  # don't é\n\n"
# Told the directories, it writes the logits of each tokens.pt, saves what it has opened, and says what was warned of.
SCRIPT = """
import sys, warnings, logging, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
for directory in sys.argv[1:]:
    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found
    tokens = torch.load(directory + "/tokens.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits.float(), directory + "/logits.pt")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == EXPECTED, type(tokenizer)
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [0, 5]
    model.save_pretrained(directory + "/again")
    tokenizer.save_pretrained(directory + "/again")
    print(transformers.__version__, str(model.dtype))
"""


def interpreter(place: Path, version: str) -> Path:
    """That of a virtual environment with a version of transformers on top of this one's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(place)], check=True)
    python = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    (site / "zz_beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", f"transformers=={version}"], check=True, timeout=400
    )
    return python


def exported(directory: Path, name: str) -> Path:
    """A random model of a family, written as recipes/export.py writes it."""
    arch = of_family(name, vocab_size=1024)
    if name == "llama":
        arch = arch.replace(rope_scaling_factor=32.0, rotary_base=500000.0, rope_original_context=16)
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    for file in TOKENIZER.glob("*token*.json"):
        shutil.copy(file, tokenizer)
    generation.write({"eos_token_id": [0, 5]}, tokenizer)
    weights = Weights(arch, saved(directory / "weights", stacked(arch)))
    dtype = torch.bfloat16 if name == "mistral" else torch.float32
    model = huggingface.Model(weights, config_of(arch, 32), tokenizer, dtype)
    (directory / "hf").mkdir()
    huggingface.write(model, directory / "hf", 4000)
    return directory / "hf"


def weights_of(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    return {name: weight.float() for file in files for name, weight in load_file(file).items()}


def opened(python: Path, directories: dict[str, Path]) -> list[str]:
    """What SCRIPT printed of exported models; it must warn of nothing."""
    from transformers import AutoTokenizer

    expected_ids = AutoTokenizer.from_pretrained(TOKENIZER)(TEXT, add_special_tokens=False)["input_ids"]
    script = f"TEXT, EXPECTED = {TEXT!r}, {expected_ids}\n{SCRIPT}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", script, *directories.values()],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    for word in ("warn", "not used", "newly initialized", "unexpected", "deprecat"):
        assert word not in done.stderr.lower(), done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_family(version: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directories = {name: exported(tmp_path / name, name) for name in FAMILIES}
    tokens = torch.randint(1024, (2, 32), generator=torch.Generator().manual_seed(4))
    for directory in directories.values():
        torch.save(tokens, directory / "tokens.pt")
    # Version 4 opens all in float32 unless it is told another dtype.
    bfloat16 = () if version.startswith("4.") else ("mistral",)
    dtypes = ["bfloat16" if name in bfloat16 else "float32" for name in directories]
    printed = opened(interpreter(tmp_path / "env", version), directories)
    assert printed == [f"{version} torch.{dtype}" for dtype in dtypes]
    for (name, directory), dtype in zip(directories.items(), dtypes, strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            expected = model(tokens).logits.float().log_softmax(-1)
        found = torch.load(directory / "logits.pt", weights_only=True).log_softmax(-1)
        tolerance = 5e-2 if dtype == "bfloat16" else 1e-4
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        again, before = find_source(directory / "again"), find_source(directory)
        assert (again.architecture, again.seq_length) == (before.architecture, before.seq_length)
        assert again.dtype == dtype
        torch.testing.assert_close(weights_of(again.files), weights_of(before.files), rtol=0, atol=0)
