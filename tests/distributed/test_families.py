"""Every family that NeMo converts: imported, pruned while sharded, exported; transformers' own models are the
reference, and the student's weights are cut out of them by plain indexing."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.errors import InputError
from nemo_minitron.export import written
from tests.support import ranks, sessions
from tests.support.hf_families import CONFIGS, CONTEXT, VOCAB_SIZE, cut, make_model
from tests.support.sessions import PATIENCE_S
from tests.support.streamed import contents, streamed

SIZES = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_query_groups": 2,
    "num_attention_heads": 2,
}
LAYOUTS = {
    # Uneven before, even after: the kept layers are spread anew.
    "mistral": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
    "qwen2": {"tensor_model_parallel_size": 2},
    "qwen2-tied": {"pipeline_model_parallel_size": 2},
    "qwen3": {"tensor_model_parallel_size": 2},
    "gemma": {"pipeline_model_parallel_size": 2},
    "nemotron": {"tensor_model_parallel_size": 2},
}


@dataclass(frozen=True)
class Example:
    """A transformers model, its directory and NeMo 2 form, and what it makes of tokens [n, s]."""

    model: Any
    directory: Path
    nemo: str
    tokens: Tensor
    logits: Tensor


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="module", params=CONFIGS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Example]:
    directory = tmp_path_factory.mktemp(request.param)
    model = make_model(directory / "hf", request.param)
    if request.param == "qwen2":
        name_code(directory / "hf")
    tokens = torch.randint(VOCAB_SIZE, (4, CONTEXT), generator=torch.Generator().manual_seed(4))
    (nemo,) = ranks.run_on_ranks(
        1, sessions.imported, str(directory / "hf"), str(directory / "cache"), timeout=PATIENCE_S
    )
    return request.param, Example(model, directory / "hf", nemo, tokens, logits_of(model, tokens))


def name_code(directory: Path) -> None:
    """Let the checkpoint name code of its own for everything that transformers may load, which leaves a trace."""
    trace = f"open({str(directory / 'it_ran')!r}, 'w')"
    (directory / "theirs.py").write_text(f"{trace}\nConfig = Model = Tokenizer = None\n")
    model, tokenizer = (directory / name for name in ("config.json", "tokenizer_config.json"))
    for file, names in (
        (model, {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}),
        (tokenizer, {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": names}))


def test_no_code_of_a_checkpoint_runs(example: tuple[str, Example]) -> None:
    name, e = example
    assert (e.directory / "theirs.py").is_file() == (name == "qwen2")
    assert not (e.directory / "it_ran").exists()


def exported(run_on_ranks: Any, nemo: str, output: Path) -> Any:
    """What is written, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    run_on_ranks(1, sessions.exported, nemo, str(output), timeout=PATIENCE_S)
    return AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager").eval()


def test_there_and_back(run_on_ranks: Any, example: tuple[str, Example], tmp_path: Path) -> None:
    _, e = example
    (logits,) = run_on_ranks(1, sessions.logits_of, e.nemo, e.tokens, timeout=PATIENCE_S)
    torch.testing.assert_close(logits, e.logits, rtol=1e-4, atol=1e-4)
    (thrifty,) = run_on_ranks(1, sessions.logits_layer_by_layer, e.nemo, e.tokens, timeout=PATIENCE_S)
    torch.testing.assert_close(thrifty, logits, rtol=1e-5, atol=1e-5)
    again = exported(run_on_ranks, e.nemo, tmp_path / "again")
    read = written.directory_read(tmp_path / "again", dict(again.named_parameters()))
    torch.testing.assert_close(written.logits(*read, e.tokens), e.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(again, e.tokens), e.logits, rtol=1e-5, atol=1e-5)
    before, after = e.model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pruned_on_two_ranks(run_on_ranks: Any, example: tuple[str, Example], tmp_path: Path) -> None:
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.pruning import make_plan, resolve_target

    name, e = example
    arch = find_source(e.directory).architecture
    assert arch == find_source(e.nemo).architecture
    assert arch.parameters() == e.model.num_parameters()
    target = resolve_target(arch, SIZES)
    plan = make_plan(arch, target, importance="random", seed=3, source_sha256="")
    expected = cut(e.model, plan)
    assert target.parameters() == expected.num_parameters()
    student = str(tmp_path / "student")
    run_on_ranks(2, sessions.pruned, e.nemo, student, plan, LAYOUTS[name], timeout=PATIENCE_S)
    assert find_source(student).architecture == target
    (logits,) = run_on_ranks(1, sessions.logits_of, student, e.tokens, timeout=PATIENCE_S)
    torch.testing.assert_close(logits, logits_of(expected, e.tokens), rtol=1e-4, atol=1e-4)
    written = exported(run_on_ranks, student, tmp_path / "hf")
    assert (written.config.head_dim, written.config.hidden_size) == (arch.kv_channels, 24)
    torch.testing.assert_close(logits_of(written, e.tokens), logits, rtol=1e-4, atol=1e-4)
    # From file to file, without any of it, every file has the same bytes.
    assert streamed(e.directory, plan, tmp_path / "streamed") == contents(tmp_path / "hf")


def test_a_directory_as_nemos_own_importer_writes_it(example: tuple[str, Example], tmp_path: Path) -> None:
    """Without vocab_size, which the padded embedding then tells, and for Mistral with a window."""
    from nemo_minitron.checkpoints.source import find_source

    _, e = example
    copy = tmp_path / "nemo"
    shutil.copytree(e.nemo, copy)
    text = (copy / "context" / "model.yaml").read_text()
    for key, value in (("vocab_size", "null"), ("window_size", "[16, 0]")):
        text, changed = re.subn(rf"(?m)^  {key}: .*$", f"  {key}: {value}", text)
        assert changed == 1
    (copy / "context" / "model.yaml").write_text(text)
    source = find_source(copy)
    assert (source.architecture, source.seq_length) == (find_source(e.nemo).architecture, 16)


def test_weights_that_do_not_fit_the_config(run_on_ranks: Any, tmp_path: Path) -> None:
    """transformers itself would fill what is missing with random numbers, and go on."""
    make_model(tmp_path, "qwen2")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(InputError, match=r"the weight files lack model\.layers\.4\."):
        run_on_ranks(1, sessions.imported, str(tmp_path), str(tmp_path / "cache"), timeout=PATIENCE_S)
    config.write_text(config.read_text().replace('"num_hidden_layers": 5', '"num_hidden_layers": 3'))
    with pytest.raises(InputError, match=r"hold a tensor that config.json does not: model\.layers\.3\."):
        run_on_ranks(1, sessions.imported, str(tmp_path), str(tmp_path / "cache"), timeout=PATIENCE_S)
    assert not (tmp_path / "cache").exists()
