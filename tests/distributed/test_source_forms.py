"""One model, told in every way that transformers 4 and 5 write it: the same logits through NeMo's model as
transformers' own. All in one process."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.checkpoints.source import Source, find_source
from tests.support import hf_families, ranks, sessions
from tests.support.hf_families import CONTEXT, VOCAB_SIZE, make_model
from tests.support.sessions import PATIENCE_S
from tests.support.streamed import contents, streamed

SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 100.0, "rope_scaling": SCALING}


def edit(directory: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def rewrite(directory: Path, change: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file({name: w.clone() for name, w in weights.items()}, directory / "model.safetensors")


def cast(directory: Path, dtype: torch.dtype, keep: str = "nothing") -> None:
    rewrite(directory, lambda ws: ws.update({n: w.to(dtype) for n, w in ws.items() if keep not in n}))


def version_5(directory: Path) -> None:
    """As transformers 5.24.0 writes config.json and the tokenizer (extra tokens are a list)."""
    rope = {"rope_theta": 100.0, **SCALING}
    edit(
        directory,
        {"rope_parameters": rope, "dtype": "float32"},
        ("rope_theta", "rope_scaling", "torch_dtype"),
    )
    (directory / "special_tokens_map.json").unlink()
    names = {"bos_token": "<eod>", "eos_token": "<eod>", "unk_token": "<eod>", "extra_special_tokens": ["w5"]}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", **names})
    )
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")


def head_only(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


def head_too(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]


def another_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


# By name: what is done to a copy of the first directory, what dtype its weights round to, and the copy's own.
FORMS: dict[str, tuple[Any, torch.dtype, str]] = {
    "version 4": (lambda d: None, torch.float32, "float32"),
    "version 5": (version_5, torch.float32, "float32"),
    "float16, output layer only": (
        lambda d: (rewrite(d, head_only), cast(d, torch.float16), edit(d, {"torch_dtype": "float16"})),
        torch.float16,
        "float16",
    ),
    "bfloat16 by the new key, both": (
        lambda d: (
            rewrite(d, head_too),
            cast(d, torch.bfloat16),
            edit(d, {"dtype": "bfloat16"}, ("torch_dtype",)),
        ),
        torch.bfloat16,
        "bfloat16",
    ),
}


def dtypes_of(checkpoint: Path) -> dict[str, str]:
    """Of the weights of a NeMo 2 directory, by torch's own table of contents."""
    from torch.distributed.checkpoint import FileSystemReader

    contents = FileSystemReader(str(checkpoint / "weights")).read_metadata().state_dict_metadata
    return {n: str(e.properties.dtype).split(".")[1] for n, e in contents.items() if hasattr(e, "size")}


@dataclass(frozen=True)
class Forms:
    """transformers' model, its tokens [n, s], and by name the directory and what came of it."""

    model: Any
    tokens: Tensor
    sources: dict[str, Source]
    found: dict[str, Any]

    def expected(self, dtype: torch.dtype) -> Tensor:
        """transformers' logits of the weights rounded to a dtype, computed in float32."""
        weights = {name: w.to(dtype).float() for name, w in self.model.named_parameters()}
        with torch.no_grad():
            return torch.func.functional_call(self.model, weights, (self.tokens,)).logits


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    home = tmp_path_factory.mktemp("forms")
    tokens = torch.randint(VOCAB_SIZE, (2, CONTEXT), generator=torch.Generator().manual_seed(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_families.CONFIGS, "llama31", LLAMA)
        model = make_model(home / "first", "llama31")
    for name, (change, _, _) in FORMS.items():
        shutil.copytree(home / "first", home / name)
        change(home / name)
    shutil.copytree(home / "first", home / "mixed")
    cast(home / "mixed", torch.bfloat16, keep="norm")
    shutil.copytree(home / "first", home / "another head")
    rewrite(home / "another head", another_head)
    shutil.copytree(home / "first", home / "other tokenizer")
    shutil.copy(home / "version 5" / "chat_template.jinja", home / "other tokenizer")
    names = [*FORMS, "mixed", "another head", "other tokenizer"]
    (found,) = ranks.run_on_ranks(
        1,
        sessions.logits_of_forms,
        [str(home / name) for name in names],
        str(home / "cache"),
        tokens,
        timeout=PATIENCE_S,
    )
    sources = {name: find_source(home / name) for name in names}
    return Forms(model, tokens, sources, dict(zip(names, found, strict=True)))


@pytest.mark.parametrize("name", FORMS)
def test_the_same_model(forms: Forms, name: str) -> None:
    _, rounding, dtype = FORMS[name]
    nemo, logits = forms.found[name]
    torch.testing.assert_close(logits, forms.expected(rounding), rtol=1e-4, atol=1e-4)
    assert forms.sources[name].architecture == forms.sources["version 4"].architecture
    assert find_source(nemo).architecture == forms.sources["version 4"].architecture
    assert forms.sources[name].dtype == find_source(nemo).dtype == dtype
    assert set(dtypes_of(Path(nemo)).values()) == {dtype}


def test_norms_that_are_wider_than_the_rest_stay_so(forms: Forms) -> None:
    """Nothing is lost in the conversion; the dtype that a student gets is that of most weights."""
    nemo, logits = forms.found["mixed"]
    weights = {n: w if "norm" in n else w.bfloat16().float() for n, w in forms.model.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(forms.model, weights, (forms.tokens,)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert find_source(nemo).dtype == forms.sources["mixed"].dtype == "bfloat16"
    for weight, dtype in dtypes_of(Path(nemo)).items():
        assert dtype == ("float32" if "norm" in weight else "bfloat16")


def test_a_student_has_its_source_s_dtype_or_the_one_asked_for(
    run_on_ranks: Any, forms: Forms, tmp_path: Path
) -> None:
    """Pruned in float32 on two ranks, saved and exported as float16: the weights are those of the source to the bit."""
    from nemo_minitron.pruning import make_plan, resolve_target

    source = forms.found["float16, output layer only"][0]
    arch = find_source(source).architecture
    target = resolve_target(arch, {"ffn_hidden_size": 20})
    plan = make_plan(arch, target, importance="random", seed=3, source_sha256="")
    student, other, sizes = tmp_path / "student", tmp_path / "other", {"tensor_model_parallel_size": 2}
    run_on_ranks(2, sessions.pruned, source, str(student), plan, sizes, timeout=PATIENCE_S)
    assert set(dtypes_of(student).values()) == {"float16"}
    asked = {**sizes, "checkpoint_dtype": "bfloat16"}
    run_on_ranks(2, sessions.saved_again, str(student), str(other), asked, timeout=PATIENCE_S)
    assert set(dtypes_of(other).values()) == {"bfloat16"}
    run_on_ranks(1, sessions.exported, str(student), str(tmp_path / "hf"), timeout=PATIENCE_S)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {w.dtype for w in written.values()} == {torch.float16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    name = "model.layers.1.mlp.up_proj.weight"
    kept = plan.kept.ffn_hidden_size
    assert kept is not None
    assert torch.equal(written[name], forms.model.get_parameter(name)[kept[1]].half())
    at_once = streamed(forms.sources["float16, output layer only"].path, plan, tmp_path / "streamed")
    assert at_once == contents(tmp_path / "hf")


def corpus(home: Path, tokenizer: Path) -> list[str]:
    """Overrides: random words, and a little of everything."""
    for name, number in (("train", 1), ("valid", 2)):
        words = torch.randint(1, VOCAB_SIZE, (400,), generator=torch.Generator().manual_seed(number))
        (home / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words))
    return [
        *("data=files", f"data.train={home}/train.txt", f"data.valid={home}/valid.txt"),
        *(f"data.tokenizer={tokenizer}", f"data.seq_length={CONTEXT}", f"data.cache_dir={home}/cache"),
        *("eval.samples=2", "trainer.micro_batch_size=2", "prune.calibration_samples=4"),
    ]


@pytest.mark.parametrize(("asked", "dtype"), [("null", "float16"), ("bfloat16", "bfloat16")])
def test_the_student_that_a_search_ends_with_has_that_dtype_too(
    run_on_ranks: Any, forms: Forms, tmp_path: Path, asked: str, dtype: str
) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    source = forms.found["float16, output layer only"][0]
    tokenizer = AutoTokenizer.from_pretrained(find_source(source).tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(tmp_path / "split")
    overrides = [
        *corpus(tmp_path, tmp_path / "split"),
        *(f"source={source}", "search.budget.parameters=9/10", "search.slack=0.5", f"run_dir={tmp_path}/run"),
        "search.grid={ffn_hidden_size:[20],hidden_size:null,num_attention_heads:null,num_layers:null}",
        f"trainer.checkpoint_dtype={asked}",
    ]
    (result,) = run_on_ranks(1, sessions.searched, overrides, timeout=PATIENCE_S)
    assert set(dtypes_of(Path(result["checkpoint"])).values()) == {dtype}


def test_a_student_carries_the_tokenizer_that_its_data_was_read_with(
    run_on_ranks: Any, forms: Forms, tmp_path: Path
) -> None:
    """`data.tokenizer` of the same ids, by other rules and with a template, beside a source whose own has none."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    source = forms.found["version 4"][0]
    tokenizer = AutoTokenizer.from_pretrained(find_source(source).tokenizer)
    assert tokenizer.chat_template is None
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(tmp_path / "foreign")
    overrides = [
        *corpus(tmp_path, tmp_path / "foreign"),
        *("prune=width", f"source={source}", "prune.ffn_hidden_size=20", f"run_dir={tmp_path}/run"),
    ]
    run_on_ranks(1, sessions.pruned_under, overrides, {}, timeout=PATIENCE_S)
    kept = AutoTokenizer.from_pretrained(find_source(tmp_path / "run" / "checkpoint").tokenizer)
    assert kept.chat_template == tokenizer.chat_template
    assert kept.encode("w7 w9") == [7, 9]


def test_two_weights_that_should_be_one(forms: Forms) -> None:
    message = forms.found["another head"]
    assert "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight" in message


def test_a_tokenizer_of_version_5_is_converted_with_its_template(forms: Forms) -> None:
    from transformers import AutoTokenizer

    nemo, _ = forms.found["version 5"]
    tokenizer = AutoTokenizer.from_pretrained(find_source(nemo).tokenizer)
    assert tokenizer.additional_special_tokens == ["w5"]
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer("w7")["input_ids"] == [7]


def test_another_tokenizer_is_another_conversion(forms: Forms) -> None:
    """The same weights and config.json: the cache does not hand over the other directory's tokenizer."""
    from transformers import AutoTokenizer

    plain, templated = forms.found["version 4"][0], forms.found["other tokenizer"][0]
    assert forms.sources["version 4"].sha256() == forms.sources["other tokenizer"].sha256()
    assert plain != templated
    templates = [
        AutoTokenizer.from_pretrained(find_source(d).tokenizer).chat_template for d in (plain, templated)
    ]
    assert templates == [None, "{{ messages[0].content }}"]
