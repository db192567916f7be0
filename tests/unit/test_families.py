"""What a config.json says, read and written, held against transformers' own configs; and what is refused."""

import json
import re
from typing import Any

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.nemo.families import FAMILIES, architecture_of, config_of, context_of, of_nemo_model
from tests.distributed.hf_families import CONFIGS, make_model

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
            {"model_type": "gemma", "hidden_act": "gelu"},
            "hidden_act 'gelu': for gemma only gelu_pytorch_tanh",
        ),
        ({"model_type": "nemotron", "hidden_act": "silu"}, "hidden_act 'silu': for nemotron only relu2"),
        ({"model_type": "qwen2", "hidden_act": ["silu"]}, "hidden_act ['silu']"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias and mlp_bias of a qwen3 model"),
        (
            {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling 'yarn': is not converted for qwen2",
        ),
        ({"model_type": "mistral", "hidden_size": "40", "head_dim": 8}, "hidden_size='40'"),
        ({"model_type": "nemotron", "norm_eps": None}, "wrong kind"),
    ],
)
def test_what_would_not_be_honoured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        architecture_of({**SIZES, **changes}, "source=here")


def test_nemo_models_go_by_their_class() -> None:
    prefix = "nemo.collections.llm.gpt.model"
    assert of_nemo_model(f"{prefix}.gemma.GemmaModel", "here") == "gemma"
    assert of_nemo_model(f"{prefix}.base.GPTModel", "here") is None
    for target in (f"{prefix}.gemma2.Gemma2Model", "os.system", "GemmaModel"):
        with pytest.raises(InputError, match=f"'{target}' is not supported; those are GPTModel, LlamaModel"):
            of_nemo_model(target, "here")
