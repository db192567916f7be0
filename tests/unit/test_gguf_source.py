"""GGUF files as sources, beside transformers, llama.cpp, sentencepiece and gguf's own quantisation."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

from nemo_minitron.checkpoints.families import architecture_of
from nemo_minitron.checkpoints.gguf import to_huggingface
from nemo_minitron.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, name_of
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.errors import InputError
from tests.support import gguf_files, llama_cpp

ASCII = 40  # a printable character in every vocabulary below
GPT2_RULES = PRE_TOKENIZERS[0].rules()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return gguf_files.byte_level(gguf_files.TEXT, 340, GPT2_RULES)


@pytest.fixture(scope="module")
def vocabulary(bpe: Tokenizer) -> dict[str, Any]:
    return gguf_files.gpt2_vocabulary(bpe, "gpt-2")


@pytest.fixture
def convert(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda file: converted(file, tmp_path / "cache")


def converted(file: Path, cache: Path) -> Path:
    return to_huggingface(file, cache, f"source={file.name}", architecture_of)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", gguf_files.CONFIGS)
def test_weights_and_logits_are_those_of_transformers(
    tmp_path: Path, convert: Any, bpe: Tokenizer, vocabulary: dict[str, Any], name: str, kind: str
) -> None:
    model = gguf_files.make_model(name, bpe.get_vocab_size())
    gguf_files.stored(model, Kind[kind])
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", model, Kind[kind], vocabulary)
    directory = convert(file)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert gguf_files.loaded(directory, torch_dtype="auto").dtype == dtype
    # Gemma's and Nemotron's norms are kept with one added, which costs the last bit.
    last_bit = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    found = gguf_files.loaded(directory, torch_dtype=torch.float32)
    for key, value in model.state_dict().items():
        expected = value.to(dtype).float()
        torch.testing.assert_close(
            found.state_dict()[key], expected, rtol=0, atol=last_bit if "norm" in key else 0
        )
    tokens = torch.tensor([bpe.encode("The lazy fox").ids])
    bound = 1e-4 if dtype == torch.float32 else 0.2  # the norms are rounded to the matrices' dtype
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits, rtol=0, atol=bound)


@pytest.mark.parametrize("name", gguf_files.CONFIGS)
def test_llama_cpp_computes_what_the_converted_model_computes(
    tmp_path: Path, convert: Any, bpe: Tokenizer, vocabulary: dict[str, Any], name: str
) -> None:
    model = gguf_files.make_model(name, bpe.get_vocab_size())
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", model, Kind.F32, vocabulary)
    tokens = bpe.encode("The lazy fox jumps over the 12345").ids
    logits = gguf_files.loaded(convert(file))(torch.tensor([tokens])).logits[0, -1]
    with llama_cpp.opened(file) as server:
        expected = llama_cpp.next_token(server, tokens, ASCII)
    found = torch.log_softmax(logits, -1)
    assert set(found.topk(3).indices.tolist()) <= set(expected)
    for token, value in expected.items():  # its keys and values are cached as float16
        assert found[token].item() == pytest.approx(value, abs=0.03)


def test_the_architecture_is_that_of_the_directory_it_came_from(
    tmp_path: Path, bpe: Tokenizer, vocabulary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_MINITRON_HOME", str(tmp_path / "home"))
    for name in gguf_files.CONFIGS:
        model = gguf_files.make_model(name, bpe.get_vocab_size())
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
        file = gguf_files.write_gguf(tmp_path / f"{name}.gguf", model, Kind.F32, vocabulary)
        expected, found = find_source(tmp_path / name), find_source(file)
        # A Mistral's file does not say that it is one.
        model_type = "llama" if name == "mistral" else expected.architecture.model_type
        assert found.architecture == expected.architecture.replace(model_type=model_type)
        assert found.seq_length == expected.seq_length
        assert found.path.is_relative_to(tmp_path / "home")
        assert find_source(file) == found


@pytest.mark.parametrize("entry", PRE_TOKENIZERS, ids=lambda entry: entry.names[0])
def test_a_text_becomes_the_tokens_that_llama_cpp_makes_of_it(
    tmp_path: Path, convert: Any, entry: Any
) -> None:
    bpe = gguf_files.byte_level(gguf_files.TEXT + gguf_files.PROMPTS, 420, GPT2_RULES, entry.ignore_merges)
    model = gguf_files.make_model("llama", bpe.get_vocab_size())
    for name in entry.names:
        vocabulary = gguf_files.gpt2_vocabulary(bpe, name)
        file = gguf_files.write_gguf(tmp_path / f"{name}.gguf", model, Kind.F32, vocabulary)
        tokenizer = Tokenizer.from_file(str(convert(file) / "tokenizer.json"))
        prompts = [*gguf_files.PROMPTS, "<|im_start|>user\nhi <|im_end|> there"]
        # The other names of the same rules: one prompt.
        for prompt in prompts if name == entry.names[0] else ["".join(gguf_files.PROMPTS)]:
            with llama_cpp.opened(file, context=512) as server:
                tokens = tokenizer.encode(prompt).ids
                assert (tokens[0] == 1) == (entry.add_bos or prompt.startswith("<"))
                by_text, by_ids = (llama_cpp.next_token(server, p, ASCII) for p in (prompt, tokens))
            assert by_text == by_ids, (name, prompt, tokenizer.encode(prompt).tokens)
            assert tokenizer.decode(tokens).strip() == re.sub(r"<\|im_\w+\|>", "", prompt).strip()


def test_rules_and_names_of_pre_tokenizers_go_both_ways() -> None:
    for entry in PRE_TOKENIZERS:
        tokenizer = {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": entry.rules()},
            "model": {"ignore_merges": entry.ignore_merges},
        }
        assert name_of(tokenizer) == entry.names[0]
    alone = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        "model": {},
    }
    assert name_of(alone) == "gpt-2"
    assert name_of({"pre_tokenizer": {"type": "Whitespace"}, "model": {}}) is None
    assert name_of({"pre_tokenizer": None, "model": {}}) is None


@pytest.fixture(scope="module", params=[True, False], ids=["space first", "as it is"])
def pieces(request: Any) -> tuple[Any, dict[str, Any]]:
    """A SentencePiece model (BPE, as Llama 2's and Gemma's) and its metadata."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(gguf_files.TEXT),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    number = range(model.vocab_size())
    types = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in number
    ]
    return model, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in number],
        "tokenizer.ggml.scores": [model.get_score(i) for i in number],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **({} if request.param else {"tokenizer.ggml.add_space_prefix": False}),
    }


def test_scores_become_merges_that_split_as_sentencepiece_does(
    tmp_path: Path, convert: Any, pieces: Any
) -> None:
    reference, vocabulary = pieces
    model = gguf_files.make_model("gemma", reference.vocab_size())
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", model, Kind.F32, vocabulary)
    directory = convert(file)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    printable = reference.piece_to_id("o")
    with llama_cpp.opened(file) as server:
        for prompt in gguf_files.PROMPTS:
            tokens = tokenizer.encode(prompt).ids
            assert tokens == [1, *reference.encode(prompt)]
            assert tokenizer.decode(tokens) == prompt
            by_text, by_ids = (llama_cpp.next_token(server, p, printable) for p in (prompt, tokens))
            assert by_text == by_ids, prompt
        turn = "</s>quick fox</s> dog"
        by_text, by_ids = (
            llama_cpp.next_token(server, p, printable) for p in (turn, tokenizer.encode(turn).ids)
        )
        assert by_text == by_ids


def test_special_tokens_ids_and_template_arrive(tmp_path: Path, convert: Any, bpe: Tokenizer) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    padded = gguf_files.gpt2_vocabulary(bpe, "smollm")
    count = bpe.get_vocab_size()
    for number in range(count, count + 4):
        padded["tokenizer.ggml.tokens"].append(f"[PAD{number}]")
        padded["tokenizer.ggml.token_type"].append(5)
    model = gguf_files.make_model("llama-tied", count + 4)
    changes = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.add_bos_token": False}
    directory = convert(gguf_files.write_gguf(tmp_path / "toy.gguf", model, Kind.F32, padded, changes))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == count
    assert tokenizer("a").keys() == {"input_ids", "attention_mask"}
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|end|>",
    )
    assert tokenizer("12a").input_ids == [tokenizer.convert_tokens_to_ids(character) for character in "12a"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 1], 0)
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [2, 1]
    assert sorted(file.name for file in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# What is changed in the metadata of a llama, and what the refusal names.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "architecture": ({"general.architecture": "phi3"}, ["general.architecture='phi3'", "nemotron"]),
    "no architecture": ({"general.architecture": 3}, ["general.architecture=3", "string"]),
    "layers": ({"llama.block_count": 3}, ["lacks the tensor blk.2."]),
    "many layers": ({"llama.block_count": 2**31 - 1}, ["llama.block_count", "tensors"]),
    "no layers": ({"llama.block_count": 0}, ["llama.block_count=0"]),
    "layers missing": ({"llama.block_count": None}, ["lack llama.block_count"]),
    "layers a word": ({"llama.block_count": "two"}, ["llama.block_count='two'"]),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, ["llama.attention.head_count"]),
    "head sizes": ({"llama.attention.value_length": 8}, ["value_length=8", "32"]),
    "hidden": ({"llama.embedding_length": 32}, ["token_embd.weight", "[340, 64]", "[340, 32]"]),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ["layer_norm_rms_epsilon=nan"]),
    "base": ({"llama.rope.freq_base": -1.0}, ["llama.rope.freq_base=-1.0"]),
    "context": ({"llama.context_length": 0}, ["llama.context_length=0"]),
    "partly rotated": ({"llama.rope.dimension_count": 8}, ["llama.rope.dimension_count=8", "32"]),
    "linear scaling": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, ["linear"]),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ["yarn"]),
    "experts": ({"llama.expert_count": 8}, ["llama.expert_count=8"]),
    "parts": ({"split.count": 3}, ["3 parts"]),
    "alignment": ({"general.alignment": 3}, ["general.alignment"]),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model='bert'"]),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "poro-chat"}, ["tokenizer.ggml.pre='poro-chat'", "smollm"]),
    "long piece": (
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["a" * 600, *map(str, range(339))],
            "tokenizer.ggml.scores": [0.0] * 340,
        },
        ["600 characters"],
    ),
    "no scores": ({"tokenizer.ggml.model": "llama"}, ["lack tokenizer.ggml.scores"]),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, ["tokenizer.ggml.pre=None", "smollm"]),
    "no tokens": ({"tokenizer.ggml.tokens": None}, ["lack tokenizer.ggml.tokens"]),
    "too many tokens": ({"tokenizer.ggml.tokens": [str(i) for i in range(341)]}, ["341", "340 rows"]),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 340}, ["twice"]),
    "types": ({"tokenizer.ggml.token_type": [1, 2]}, ["tokenizer.ggml.token_type", "340"]),
    "merge of no token": ({"tokenizer.ggml.merges": ["qqq zzz"]}, ["tokenizer cannot be built"]),
    "half a merge": ({"tokenizer.ggml.merges": ["abc"]}, ["tokenizer.ggml.merges='abc'"]),
    "empty merge": ({"tokenizer.ggml.merges": [""]}, ["tokenizer.ggml.merges=''"]),
    "end": ({"tokenizer.ggml.eos_token_id": 340}, ["tokenizer.ggml.eos_token_id=340"]),
    "template": ({"tokenizer.chat_template": 5}, ["tokenizer.chat_template=5"]),
}


@pytest.fixture(scope="module")
def toy(bpe: Tokenizer) -> Any:
    assert bpe.get_vocab_size() == 340
    return gguf_files.make_model("llama", 340)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_converted_is_refused_by_name(
    tmp_path: Path, convert: Any, toy: Any, vocabulary: dict[str, Any], case: str
) -> None:
    changes, names = REFUSED[case]
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", toy, Kind.F32, vocabulary, changes)
    with pytest.raises(InputError) as refusal:
        convert(file)
    message = str(refusal.value)
    assert all(name in message for name in ["source=toy.gguf", *names]), message
    assert "\n" not in message
    assert not list((tmp_path / "cache").glob("*"))


def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, convert: Any, toy: Any, vocabulary: dict[str, Any]
) -> None:
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", toy, Kind.F32, vocabulary)
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"blk\.1.*not finite|output.*not finite"):
        convert(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged GGUF file"),
        (b"GGUF", "the file ends within the version"),
        (b"\x80\x04 a pickle", "does not begin with GGUF"),
        (b"GGUF" + (1).to_bytes(4, "little"), "version 1; 2 and 3"),
        (b"GGUF" + (3).to_bytes(4, "big"), "little-endian"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_files_that_only_call_themselves_gguf_are_refused(
    tmp_path: Path, convert: Any, content: bytes, message: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "x.gguf")


def test_rope_factors_of_another_kind_are_refused(
    tmp_path: Path, convert: Any, bpe: Tokenizer, vocabulary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gguf_files.make_model("llama-tied", bpe.get_vocab_size())
    monkeypatch.setattr(
        gguf_files, "_rope_factors", lambda c: np.linspace(1, 7, c.head_dim // 2, dtype=np.float32)
    )
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", model, Kind.F32, vocabulary)
    with pytest.raises(InputError, match="rope_freqs"):
        convert(file)


@pytest.mark.parametrize(
    ("factor", "low", "high", "theta"),
    [(8.0, 1.0, 4.0, 5e5), (32.0, 1.0, 4.0, 5e5), (4.0, 2.0, 16.0, 1e4), (16.0, 0.5, 64.0, 5e5)],
)
def test_rope_scaling_is_found_from_its_factors(
    tmp_path: Path,
    convert: Any,
    bpe: Tokenizer,
    vocabulary: dict[str, Any],
    factor: float,
    low: float,
    high: float,
    theta: float,
) -> None:
    model = gguf_files.make_model("llama-tied", bpe.get_vocab_size())
    model.config.rope_theta = theta
    stated = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    model.config.rope_scaling = {"rope_type": "llama3", **stated, "original_max_position_embeddings": 8192}
    file = gguf_files.write_gguf(tmp_path / "toy.gguf", model, Kind.F32, vocabulary)
    found = json.loads((convert(file) / "config.json").read_text())
    assert found["rope_theta"] == theta
    assert found["rope_scaling"] == model.config.rope_scaling


HOSTILE_COUNTS = [0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def test_damaged_files_are_refused_with_one_line(
    tmp_path: Path, toy: Any, vocabulary: dict[str, Any]
) -> None:
    """Bits flipped in the header, counts and lengths replaced, files cut: refused, or still a file of a model."""
    import tracemalloc

    whole = gguf_files.write_gguf(tmp_path / "toy.gguf", toy, Kind.Q8_0, vocabulary).read_bytes()
    header = len(whole) - sum(p.numel() for p in toy.parameters()) * 34 // 32
    draw, messages = random.Random(7), []
    tracemalloc.start()
    for trial in range(200):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[draw.randrange(len(data)) :]
        elif trial % 3 == 1:
            at = draw.choice([8, 16, *[draw.randrange(header) for _ in range(6)]])
            data[at : at + 8] = draw.choice(HOSTILE_COUNTS).to_bytes(8, "little")
        else:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(header)] ^= 1 << draw.randrange(8)
        file = tmp_path / "damaged.gguf"
        file.write_bytes(data)
        try:
            converted(file, tmp_path / "cache")
        except InputError as error:
            messages.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(messages) > 120
    assert all("\n" not in message and len(message) < 1000 for message in messages)
    assert peak < 64 << 20, peak
