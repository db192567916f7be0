"""recipes/export.py format=gguf: a student's file, taken as a source again, and what llama.cpp makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tests.functional.conftest import Pruned
from tests.support import llama_cpp
from tests.support.commands import Commands


def export(commands: Commands, source: Path, to: Path, kind: str) -> dict[str, Any]:
    settings = [f"export.quantization={kind}", "export.verify_tokens=64", "export.perplexity_tokens=40"]
    places = ["license=none", f"source={source}", f"to={to}", f"run_dir={to}-run"]
    return commands.run("export", "format=gguf", *settings, *places).result()


def values(file: Path) -> dict[str, Any]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


@pytest.mark.slow
def test_a_quantised_file_is_a_source(commands: Commands, pruned: Pruned, tmp_path: Path) -> None:
    """GGUF, source, GGUF in float32: the same values bit for bit, the same tokenizer and template."""
    first = export(commands, pruned.run_dir, tmp_path / "first", "Q8_0")
    quantised = tmp_path / "first" / "model-Q8_0.gguf"
    assert [path.name for path in (tmp_path / "first").glob("*.gguf")] == [quantised.name]
    second = export(commands, quantised, tmp_path / "second", "F32")
    plain = tmp_path / "second" / "model-F32.gguf"
    before, after = values(quantised), values(plain)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name
    fields = [
        {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
        for file in (quantised, plain)
    ]
    of_the_file = {"general.file_type"}
    differ = {key for key in fields[0].keys() | fields[1].keys() if fields[0].get(key) != fields[1].get(key)}
    assert {key for key in differ if not key.startswith("GGUF.")} <= of_the_file
    assert (first["params"], first["stop_token_ids"]) == (second["params"], second["stop_token_ids"])
    assert first["rows_that_fit_no_block"] > len(first["rows_that_fit_no_block_first"]) == 5
    lines = (tmp_path / "first" / "Modelfile").read_text().splitlines()
    assert "FROM ./model-Q8_0.gguf" in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert second["verify_max_difference"] < 1e-4 * max(1, second["verify_largest_logit"])


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(commands: Commands, pruned: Pruned, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_minitron.export.written import text

    result = export(commands, pruned.run_dir, tmp_path / "gguf", "Q8_0")
    settings = [
        "license=none",
        f"source={pruned.run_dir}",
        f"to={tmp_path / 'hf'}",
        f"run_dir={tmp_path / 'hf-run'}",
    ]
    commands.run("export", *settings).result()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text())[:40]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # Tokens that are half a character are not counted; in English prose there are none.
    assert result["perplexity_tokens"] == 39
    assert math.log(result["perplexity_f16"]) == pytest.approx(loss, abs=5e-3)
    assert math.log(result["perplexity"]) == pytest.approx(loss, abs=5e-2)
    with llama_cpp.opened(tmp_path / "gguf" / "model-Q8_0.gguf") as server:
        assert len(llama_cpp.greedy(server, ids[0, :8].tolist(), 4)) == 4
    assert json.loads((tmp_path / "gguf-run" / "result.json").read_text())["quantization"] == "Q8_0"
