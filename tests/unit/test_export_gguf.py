"""GGUF files out of stacked, fused weights: run by llama.cpp and read back, beside transformers with these weights."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

from nemo_minitron.checkpoints.families import FAMILIES, architecture_of, config_of
from nemo_minitron.checkpoints.gguf import to_huggingface
from nemo_minitron.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from nemo_minitron.errors import InputError
from nemo_minitron.export import consumers, gguf_model, gguf_quantiser, huggingface
from nemo_minitron.export.gguf_tokenizer import vocabulary_of
from nemo_minitron.export.tensors import Weights
from tests.support import gguf_files, llama_cpp
from tests.support.export_students import ROWS, TEMPLATE, TEXT, Student, arch_of, made
from tests.support.stacked_weights import of_family, saved, stacked

PROMPT = "The lazy fox jumps over 12345"
ASCII = 40


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    return made(tmp_path_factory.mktemp(request.param), arch_of(request.param))


def test_llama_cpp_goes_on_as_transformers_does(student: Student, tmp_path: Path) -> None:
    ids = student.tokenizer.encode(PROMPT)
    model = student.transformers()
    with torch.no_grad():
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        log_probabilities = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    for kind in ("F32", "F16"):
        file = tmp_path / f"{kind}.gguf"
        student.written(file, kind)
        with llama_cpp.opened(file) as server:
            assert llama_cpp.next_token(server, PROMPT, ASCII) == llama_cpp.next_token(server, ids, ASCII)
            found = llama_cpp.next_token(server, ids, ASCII)
            for token, value in found.items():
                assert log_probabilities[token].item() == pytest.approx(value, abs=0.03), kind
            if kind == "F32":
                # Those that are characters; of half a one the server tells nothing.
                said = llama_cpp.text(server, ids, 12)
                assert said == student.tokenizer.decode(whole[0, len(ids) :].tolist())


@pytest.mark.parametrize("kind", gguf_model.KINDS)
def test_what_is_read_back_is_what_was_written(student: Student, tmp_path: Path, kind: str) -> None:
    report = student.written(tmp_path / "a.gguf", kind)
    back = to_huggingface(tmp_path / "a.gguf", tmp_path / "cache", "source=a.gguf", architecture_of)
    from safetensors.torch import load_file

    found, expected = load_file(back / "model.safetensors"), student.transformers().state_dict()
    expected = {name: value for name, value in expected.items() if name in found}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        fits = value.shape[-1] % 32 == 0
        stored = Kind[kind if kind != "Q8_0" or fits else "F16"]
        if value.ndim > 1:
            packed = gguf.quants.quantize(value.numpy(), stored)
            value = torch.from_numpy(gguf.quants.dequantize(packed, stored))
        dtype = found[name].dtype
        # Gemma's and Nemotron's norms are kept with one added, which costs the last bit.
        last_bit = (
            {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype] if "norm" in name else 0
        )
        torch.testing.assert_close(found[name], value.to(dtype), rtol=0, atol=last_bit)
    uneven = {24, 20} if kind == "Q8_0" else set()
    assert {row for row in report.kept.values() if row % 32} == set(report.kept.values()) >= uneven


def test_a_float32_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """The weights of a file, its tokenizer and its template, after another round."""
    student = made(tmp_path / "student", arch_of("llama"))
    student.written(tmp_path / "a.gguf", "F32")
    back = to_huggingface(tmp_path / "a.gguf", tmp_path / "cache", "source=a.gguf", architecture_of)
    rows = student.model.weights.architecture.vocab_size
    tokenizer = huggingface.load_tokenizer(back, rows)
    settings = huggingface.generation_settings(back, rows)
    again = vocabulary_of(tokenizer, settings, rows, "again")
    for name in ("model", "pre", "texts", "merges", "template", "flags"):
        assert getattr(again, name) == getattr(student.vocabulary, name), name
    assert dict(again.ids) == dict(student.vocabulary.ids)
    from safetensors.torch import load_file

    found, expected = (
        load_file(back / "model.safetensors"),
        load_file(student.directory / "model.safetensors"),
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_3_2(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tied embeddings, scaled rotation, heads of another width, three stop tokens, rows that pad the vocabulary, and
    shards, all at once, in transformers and in llama.cpp."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    arch = of_family(
        "llama",
        vocab_size=ROWS,
        share_embeddings_and_output_weights=True,
        num_attention_heads=4,
        num_query_groups=1,
        rope_scaling_factor=32.0,
        rope_original_context=64,
        rotary_base=5e5,
    )
    assert arch.hidden_size != arch.query_size
    tensors = {name: tensor.to(dtype) for name, tensor in stacked(arch, rows=384).items()}
    student = made(
        tmp_path, arch, tensors, {"eos_token_id": [0, 5], "temperature": 0.6}, dtype, max_shard=4000
    )
    hf = tmp_path / "hf"
    assert len(list(hf.glob("*.safetensors"))) > 1
    model, found = AutoModelForCausalLM.from_pretrained(hf, torch_dtype="auto", output_loading_info=True)
    assert not any(found.values())
    assert (model.dtype, model.config.vocab_size, model.config.head_dim) == (dtype, ROWS, arch.kv_channels)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, tensors["module.embedding.word_embeddings.weight"][:ROWS])
    # The template's end marker joins the author's list.
    assert GenerationConfig.from_pretrained(hf).eos_token_id == [0, 5, 2]
    report = student.written(tmp_path / "a.gguf", "F32")
    assert not report.kept
    names = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert "output.weight" not in names
    assert names["token_embd.weight"] == [arch.hidden_size, ROWS]
    assert student.vocabulary.ids == {"eos": 0, "eot": 5, "eom": 2, "bos": 0, "pad": 0}
    ids = student.tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = model.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    with llama_cpp.opened(tmp_path / "a.gguf") as server:
        for token, value in llama_cpp.next_token(server, ids, ASCII).items():
            assert expected[token].item() == pytest.approx(value, abs=5e-3)


def test_metadata_by_the_format_s_own_reader(student: Student, tmp_path: Path) -> None:
    student.written(tmp_path / "a.gguf", "F16")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    value = {name: field.contents() for name, field in reader.fields.items()}
    arch = student.model.weights.architecture
    name = value["general.architecture"]
    assert (
        value[f"{name}.attention.key_length"] == value[f"{name}.attention.value_length"] == arch.kv_channels
    )
    assert value[f"{name}.embedding_length"] == 24
    # The end-of-text token, and the one that the template ends an answer with.
    assert (value["tokenizer.ggml.eos_token_id"], value["tokenizer.ggml.eot_token_id"]) == (0, 2)
    assert value["tokenizer.ggml.pre"] == "qwen2"
    assert value["tokenizer.ggml.tokens"][-1] == f"[PAD{ROWS - 1}]"
    assert value["tokenizer.chat_template"] == TEMPLATE
    for tensor in reader.tensors:
        assert tensor.tensor_type == (Kind.F32 if len(tensor.shape) == 1 else Kind.F16)


def test_a_value_beyond_float16_is_no_infinity() -> None:
    with pytest.raises(RuntimeError, match="blk: a value is beyond float16"):
        gguf_model.packed(torch.tensor([[1e5, 0.0]]), "F16", "blk")
    assert np.isfinite(
        gguf.quants.dequantize(gguf_model.packed(torch.tensor([[1e5]]), "BF16", ""), Kind.BF16)
    ).all()


# ---- tokenizers ----------------------------------------------------------------------------------------------


def sentencepiece_like(prefix: bool) -> Tokenizer:
    """Llama 2's form: merges, bytes for what is unknown, spaces as '▁'."""
    from tokenizers import decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_s_bpe_in_llama_cpp(tmp_path: Path, prefix: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_like(prefix), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    arch = of_family("llama", vocab_size=len(tokenizer))
    weights = Weights(arch, saved(tmp_path / "weights", stacked(arch)))
    model = huggingface.Model(weights, config_of(arch, 128), tmp_path, torch.float32)
    vocabulary = vocabulary_of(tokenizer, {"eos_token_id": 2, "bos_token_id": 1}, arch.vocab_size, "toy")
    assert (vocabulary.model, vocabulary.flags["add_space_prefix"]) == ("llama", prefix)
    gguf_model.write(model, vocabulary, tmp_path / "a.gguf", "F32")
    with llama_cpp.opened(tmp_path / "a.gguf") as server:
        for prompt in (PROMPT, "don't  stop 漢字\n", "quick quick lazy"):
            by_text, by_ids = (
                llama_cpp.next_token(server, p, 300) for p in (prompt, tokenizer.encode(prompt))
            )
            assert by_text == by_ids, prompt


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    digits = [{"type": "Digits", "individual_digits": False}, *PRE_TOKENIZERS[0].rules()]
    lower = json.loads(gguf_files.byte_level(TEXT, 300, PRE_TOKENIZERS[0].rules()).to_str())
    lower["normalizer"] = {"type": "Lowercase"}
    for backend, words in (
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "a WordLevel tokenizer"),
        (gguf_files.byte_level(TEXT, 300, digits), "llama.cpp knows no pre-tokenizer like"),
        (Tokenizer.from_str(json.dumps(lower)), "normalizer Lowercase"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        with pytest.raises(InputError, match=words):
            vocabulary_of(tokenizer, {}, 400, "toy")


def test_packages_and_shapes_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    there = {"gguf"}
    monkeypatch.setattr(util, "find_spec", lambda name: name if name in there else None)
    with pytest.raises(InputError, match="export.quantization=Q4_K_M.*llama-cpp-python"):
        gguf_quantiser.check_packages("Q4_K_M", ("Q4_K_M",), perplexity=False)
    with pytest.raises(InputError, match="export.perplexity_tokens: needs the package xllamacpp"):
        gguf_quantiser.check_packages("Q8_0", ("Q4_K_M",), perplexity=True)
    gguf_quantiser.check_packages("F16", ("Q4_K_M",), perplexity=False)
    there.clear()
    with pytest.raises(InputError, match="format=gguf: needs the package gguf"):
        gguf_quantiser.check_packages("F16", (), perplexity=False)


@pytest.mark.parametrize("name", ["qwen2", "nemotron"])
def test_what_llama_cpp_does_not_open_is_known(name: str, tmp_path: Path) -> None:
    """Where heads are not as wide as the residual stream; llama.cpp itself is asked."""
    arch = of_family(name, vocab_size=ROWS)
    assert arch.query_size != arch.hidden_size
    student = made(tmp_path, arch)
    student.written(tmp_path / "a.gguf", "F32")
    with pytest.raises(RuntimeError), llama_cpp.opened(tmp_path / "a.gguf"):
        pass
    assert "is 4 x 8, and hidden_size is 24" in str(consumers.refusal("llama.cpp", arch))
    assert consumers.refusal("llama.cpp", arch.replace(kv_channels=6)) is None
    assert consumers.refusal("llama.cpp", of_family("llama")) is None
