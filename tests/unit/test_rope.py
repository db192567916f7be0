"""Rotary embeddings in both of transformers' forms: one meaning (the logits: tests/distributed/test_sessions.py)."""

import re
from typing import Any

import pytest

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.rope import config_of, rope_of
from nemo_minitron.errors import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 64,
}
SCALED = {
    "rotary_base": 5e5,
    "rotary_percent": 1.0,
    "rope_scaling_factor": 32.0,
    "rope_low_freq_factor": 2.0,
    "rope_high_freq_factor": 8.0,
    "rope_original_context": 64,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, SCALED),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, SCALED),
        (
            {"rope_theta": 500000, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
            SCALED,
        ),
        ({"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}, SCALED),
        (
            {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rotary_base": 1e6},
        ),
        ({"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e6}, {"rotary_base": 1e6}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": None}},
            {"rotary_base": 1e6},
        ),
        ({}, {"rotary_base": 1e4, "rotary_percent": 1.0}),
        ({"model_type": "nemotron"}, {"rotary_base": 1e4, "rotary_percent": 0.5}),
        ({"model_type": "nemotron", "partial_rotary_factor": 0.25}, {"rotary_percent": 0.25}),
        (
            {"model_type": "nemotron", "rope_parameters": {"partial_rotary_factor": 0.25}},
            {"rotary_percent": 0.25},
        ),
    ],
    ids=str,
)
def test_both_forms(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = rope_of({"model_type": "llama", **config}, "here")
    assert found | expected == found
    assert ("rope_scaling_factor" in found) == ("rope_scaling_factor" in expected)


def test_what_is_written_says_the_same_again() -> None:
    arch = Architecture(2, 40, 48, 8, 4, 8, 64, model_type="llama", **SCALED)
    assert rope_of({"model_type": "llama", **config_of(arch)}, "here") == SCALED


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention is a mapping"),
        ({"rope_parameters": [1]}, "rope_parameters=[1]: must be a mapping"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta=10000.0 in config.json, but 5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling 'yarn': only 'llama3' is known"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling 'linear': only 'llama3' is known"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling 'default': key 'factor' is not known"),
        ({"rope_scaling": {"type": "default", "rope_type": "llama3"}}, "rope_type 'llama3', but type 'default'"),
        ({"model_type": "gemma", "rope_parameters": LLAMA3}, "'llama3': is not converted for gemma"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "key 'attention_factor' is not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, "rope_scaling.factor=0.5: must be at least 1"),
        ({"rope_scaling": {**LLAMA3, "factor": True}}, "rope_scaling.factor=True: must be a positive"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 8.0}}, "low_freq_factor=8.0: must be below high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.5}}, "=64.5: must be a positive integer"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: must be a positive, finite number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf: must be a positive, finite number"),
        ({"rope_theta": -1}, "rope_theta=-1: must be a positive, finite number"),
        ({"rope_theta": 10**5000}, "must be a positive, finite number"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6': must be a positive, finite number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: must be 1: a llama model rotates whole heads"),
        ({"model_type": "nemotron", "partial_rotary_factor": 2}, "partial_rotary_factor=2.0: must be at most 1"),
    ],
    ids=range(21),
)  # fmt: skip
def test_what_is_not_converted_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        rope_of({"model_type": "llama", **config}, "source=here")
