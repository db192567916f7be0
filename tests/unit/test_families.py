"""What a config.json says, read and written, held against transformers' own configs; and what is refused."""

import json
import re
from typing import Any

import pytest

from nemo_minitron.checkpoints.config_keys import check_keys
from nemo_minitron.checkpoints.families import FAMILIES, architecture_of, config_of, context_of, of_nemo_model
from nemo_minitron.errors import InputError
from tests.support.hf_families import CONFIGS, make_model

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_transformers_wrote(name: str, tmp_path: Any) -> None:
    """Every parameter is counted; what is written states the same architecture again, also to transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = make_model(tmp_path, name)
    arch = architecture_of(json.loads((tmp_path / "config.json").read_text()), "here")
    assert arch.parameters() == model.num_parameters()
    assert check_keys(model.config.to_dict(), "here") == []
    written = AutoConfig.for_model(arch.model_type, **config_of(arch, 32))
    assert AutoModelForCausalLM.from_config(written).num_parameters() == model.num_parameters()
    kept = {key: value for key, value in written.to_dict().items() if key in model.config.to_dict()}
    ours, theirs = architecture_of(kept, "there"), model.config
    assert ours == arch
    assert (arch.kv_channels, arch.num_query_groups) == (theirs.head_dim, theirs.num_key_value_heads)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_config_json_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    from transformers import AutoConfig

    given = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    whole = AutoConfig.for_model(model_type, **given).to_dict()
    whole["head_dim"] = whole.get("head_dim") or 5
    assert architecture_of({"model_type": model_type, **given}, "here") == architecture_of(whole, "there")


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"model_type": "llama"}, 32),
        ({"model_type": "mistral"}, 32),  # transformers' window of 4096 is wider
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "qwen2", "sliding_window": 16}, 32),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, 16),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 2, "sliding_window": None}, 32),
        (
            {
                "model_type": "qwen3",
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 16,
            },
            16,
        ),
        ({"model_type": "llama", "layer_types": ["full_attention"] * 2}, 32),
    ],
)
def test_a_window_bounds_the_context(changes: dict[str, Any], context: int) -> None:
    assert context_of({**SIZES, **changes}, "here") == context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not converted; those are llama, mistral, qwen2"),
        ({"model_type": None}, "model_type None is not converted"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not converted"),
        (
            {"model_type": "gemma", "hidden_act": "silu"},
            "hidden_act 'silu': for gemma only gelu_pytorch_tanh",
        ),
        (
            {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu"},
            "hidden_activation 'gelu': for gemma only gelu_pytorch_tanh is converted",
        ),
        ({"model_type": "nemotron", "hidden_act": "silu"}, "hidden_act 'silu': for nemotron only relu2"),
        ({"model_type": "qwen2", "hidden_act": ["silu"]}, "hidden_act ['silu']"),
        (
            {"model_type": "qwen3", "attention_bias": True},
            "attention_bias=True: is not converted for a qwen3 model",
        ),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True: is not converted for a llama model"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            {"model_type": "llama", "per_layer_config": {"1": {"head_dim": 4}}},
            "per_layer_config={'1': {'head_dim': 4}}",
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}},
            "quant_method 'fp8'): quantised",
        ),
        (
            {"model_type": "llama", "quantization_config": "x" * 999},
            "xxx...): quantised weights are not read",
        ),
        (
            {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling 'yarn': is not converted for qwen2",
        ),
        ({"model_type": "mistral", "hidden_size": "40", "head_dim": 8}, "hidden_size='40'"),
        ({"model_type": "nemotron", "norm_eps": None}, "norm_eps=None: must be a positive, finite number"),
        (
            {"model_type": "llama", "rms_norm_eps": float("nan")},
            "rms_norm_eps=nan: must be a positive, finite number",
        ),
        (
            {"model_type": "llama", "rms_norm_eps": float("inf")},
            "rms_norm_eps=inf: must be a positive, finite number",
        ),
        (
            {"model_type": "llama", "num_hidden_layers": -1},
            "num_hidden_layers=-1: must be a positive integer",
        ),
        (
            {"model_type": "llama", "num_key_value_heads": 0},
            "num_key_value_heads=0: must be a positive integer",
        ),
        ({"model_type": "llama", "head_dim": 8.0}, "head_dim=8.0: must be a positive integer"),
        ({"model_type": "llama", "hidden_size": True}, "hidden_size=True: must be a positive integer"),
        ({"model_type": "llama", "vocab_size": 10**400}, "...: must be a positive integer"),
        (
            {"model_type": "llama", "hidden_size": 4, "num_key_value_heads": 8},
            "hidden_size=4: must be at least",
        ),
        (
            {"model_type": "llama", "tie_word_embeddings": "false"},
            "tie_word_embeddings='false': must be true or false",
        ),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim=None: must be a positive integer"),
    ],
)
def test_what_would_not_be_honoured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        architecture_of({**SIZES, **changes}, "source=here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings=None: must be a positive integer"),
        (
            {"max_position_embeddings": float("nan")},
            "max_position_embeddings=nan: must be a positive integer",
        ),
        (
            {"max_position_embeddings": 2**31},
            "max_position_embeddings=2147483648: must be a positive integer",
        ),
        ({"sliding_window": -1, "use_sliding_window": True}, "sliding_window=-1: must be a positive integer"),
        (
            {"sliding_window": 16, "use_sliding_window": "yes"},
            "use_sliding_window='yes': must be true or false",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types=['full_attention']: must list 2 layers"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layer_types: 'linear_attention' is not converted",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None},
            "layer_types names sliding_attention, but sliding_window is null",
        ),
    ],
    ids=range(8),
)
def test_a_context_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        context_of({"model_type": "qwen3", **SIZES, **changes}, "source=here")


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
        {},
    ],
    ids=str,
)
def test_gemma_means_the_tanh_approximation_whatever_it_calls_it(said: dict[str, Any]) -> None:
    arch = architecture_of({**SIZES, "model_type": "gemma", "head_dim": 16, **said}, "here")
    assert arch.activation == "gelu_tanh"
    written = config_of(arch, 32)
    assert written["hidden_act"] == written["hidden_activation"] == "gelu_pytorch_tanh"


def test_keys_that_are_not_read_are_listed() -> None:
    """What both versions of transformers write is known; what is made up is named."""
    config = {
        "model_type": "llama",
        "architectures": [],
        "dtype": "float32",
        "use_cache": True,
        "_name_or_path": "x",
    }
    assert check_keys(config, "here") == []
    more = {"router_scale": 2, "sliding_windows": 8, "attention_dropout": 0.1, "hidden_activation": "silu"}
    assert check_keys(config | more, "here") == [
        "attention_dropout=0.1 (training here is without)",
        "hidden_activation",
        "router_scale",
        "sliding_windows",
    ]
    # Qwen2's model code has biases and asks nobody.
    assert check_keys({"model_type": "qwen2", "attention_bias": True}, "here") == []


def test_nemo_models_go_by_their_class() -> None:
    prefix = "nemo.collections.llm.gpt.model"
    assert of_nemo_model(f"{prefix}.gemma.GemmaModel", "here") == "gemma"
    assert of_nemo_model(f"{prefix}.base.GPTModel", "here") is None
    for target in (f"{prefix}.gemma2.Gemma2Model", "os.system", "GemmaModel"):
        with pytest.raises(InputError, match=f"'{target}' is not supported; those are GPTModel, LlamaModel"):
            of_nemo_model(target, "here")
