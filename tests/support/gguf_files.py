"""GGUF files of transformers' models, written with gguf's writer by llama.cpp's published rules.

Written apart from the reader under test, and proven by llama.cpp, which runs the files.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

TEXT = [
    "The quick brown fox jumps over the lazy dog 12345 times.",
    "don't stop; we'LL go  on\n\n    to x_y = 1 (foo) // bar",
    "Straße, naïve café; 漢字 and emoji 🙂🙂 in one line",
] * 3
PROMPTS = [
    "Hello world 12345, lazy fox",
    "  a\n\n b\tc  \n",
    "don't 'LL we'Ve HTTPServer camelCase",
    "ünïcödé — 漢字 🙂🙂 Straße",
    "x=1;y ==2 // foo_bar\r\n\r\n/etc/x",
    "3.14 ½ ² ٣٤ 1234567",
    "       z   ",
]
HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 128
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
# By architecture of the file; head_dim is not always hidden / heads, where llama.cpp allows it.
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 32},
    "llama-tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "nemotron": {"model_type": "nemotron"},
}
_ARCHITECTURES = {"mistral": "llama"}
_NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_model(name: str, vocab_size: int) -> Any:
    """transformers' model with random weights; norms and biases are not at their trivial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(**{**_COMMON, **CONFIGS[name], "vocab_size": vocab_size})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def stored(model: Any, kind: Kind) -> None:
    """Give the model the weights that a file of this kind keeps, rounded by gguf's own functions."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                packed = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))


def write_gguf(
    file: Path, model: Any, kind: Kind, vocabulary: dict[str, Any], changes: dict[str, Any] | None = None
) -> Path:
    """Write a model and a vocabulary.

    Args:
        kind: of the matrices; norms and biases are float32.
        vocabulary: metadata of the tokenizer, by key.
        changes: metadata that are written instead of, or beside the right ones; None leaves a key out.
    """
    c = model.config
    architecture = _ARCHITECTURES.get(c.model_type, c.model_type)
    writer = gguf.GGUFWriter(file, architecture)
    values = {**_hyperparameters(c, architecture), **vocabulary, **(changes or {})}
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    for name, parameter in model.named_parameters():
        data = _as_written(name, parameter.detach().numpy(), c)
        theirs = _name(name)
        if data.ndim > 1:
            writer.add_tensor(theirs, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, data.astype(np.float32))
    if (getattr(c, "rope_scaling", None) or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(c))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _hyperparameters(c: Any, architecture: str) -> dict[str, Any]:
    a = architecture
    values = {
        "general.name": "toy",
        f"{a}.block_count": c.num_hidden_layers,
        f"{a}.context_length": c.max_position_embeddings,
        f"{a}.embedding_length": c.hidden_size,
        f"{a}.feed_forward_length": c.intermediate_size,
        f"{a}.attention.head_count": c.num_attention_heads,
        f"{a}.attention.head_count_kv": c.num_key_value_heads,
        f"{a}.attention.key_length": c.head_dim,
        f"{a}.attention.value_length": c.head_dim,
        f"{a}.rope.dimension_count": c.head_dim,
        f"{a}.rope.freq_base": float(c.rope_theta),
        f"{a}.vocab_size": c.vocab_size,
    }
    if a == "nemotron":
        values[f"{a}.rope.dimension_count"] = int(c.head_dim * c.partial_rotary_factor)
        return {**values, f"{a}.attention.layer_norm_epsilon": c.norm_eps}
    return {**values, f"{a}.attention.layer_norm_rms_epsilon": c.rms_norm_eps}


def _name(name: str) -> str:
    if name == "lm_head.weight":
        return "output.weight"
    if name.startswith("model.norm."):
        return name.replace("model.norm", "output_norm")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"blk.{layer[1]}.{_NAMES[layer[2]]}.{layer[3]}"
    return name.replace("model.embed_tokens", "token_embd")


def _as_written(name: str, data: Any, c: Any) -> Any:
    if c.model_type in ("gemma", "nemotron") and name.endswith("norm.weight"):
        return data + 1
    if c.model_type in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
        half = data.shape[0] // heads // 2
        return np.ascontiguousarray(data.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(data.shape))
    return data


def _rope_factors(c: Any) -> Any:
    """What transformers divides each frequency by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, "cpu")
    plain = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    return (plain / scaled.double()).float().numpy()


def byte_level(
    text: list[str], vocab_size: int, rules: list[dict[str, Any]], ignore_merges: bool = False
) -> Any:
    """A trained byte-level BPE of `tokenizers` with the given steps of pre-tokenization."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    values = json.loads(tokenizer.to_str())
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
    values["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(values))


def gpt2_vocabulary(tokenizer: Any, pre: str) -> dict[str, Any]:
    """The metadata of a byte-level BPE, whose special tokens are the added ones."""
    model = json.loads(tokenizer.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].get)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text in added else 1 for text in texts],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def loaded(directory: Path, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, **changes
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


def float32_copy(source: Path, to: Path) -> Path:
    """A GGUF file with the same metadata and all weights dequantised, by gguf's own reader and writer."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        of = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, entry.contents(), entry.types[0], of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
