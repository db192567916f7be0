"""The proofs of nemo_minitron/cpu_compat/local_spec.py; tests.support.host_gaps runs them after its own."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.host_gaps import breaks, close, shows


@shows("local_spec")
def local_norm_refuses_sequence_parallel(gap: Callable[[], None]) -> None:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import TransformerConfig, torch_norm, transformer_block

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm",
        layernorm_zero_centered_gamma=True, bias_dropout_fusion=False, use_cpu_initialization=True,
    )  # fmt: skip
    breaks(lambda: torch_norm.WrappedTorchNorm(config, 8))
    config.layernorm_zero_centered_gamma, config.sequence_parallel = False, True
    breaks(lambda: torch_norm.WrappedTorchNorm(config, 8))
    gap()
    from nemo_minitron.cpu_compat.norm import HostNorm

    layer = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is HostNorm
    assert transformer_block.LayerNormImpl is torch_norm.WrappedTorchNorm is HostNorm
    norm = torch_norm.WrappedTorchNorm(config, 8)
    assert norm.weight.sequence_parallel


@shows("local_spec")
def local_attention_keeps_all_scores(gap: Callable[[], None]) -> None:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True
    )
    config.window_size = (2, 0)
    ranks = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))

    def attention() -> Any:
        spec = gpt_layer_specs.get_gpt_layer_local_spec().submodules.self_attention.submodules.core_attention
        return spec(config, 1, AttnMaskType.causal, "self", model_comm_pgs=ranks)

    breaks(attention)
    gap()
    value = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 4)
    even = torch.zeros(4, 1, 2, 4)  # equal scores: each query takes the mean of the three keys that it sees
    close(attention().eval()(even, even, value, None)[:, 0, 0], torch.tensor([0.0, 0.5, 1.0, 2.0]))


@shows("local_spec")
def steps_want_a_mask(gap: Callable[[], None]) -> None:
    from nemo.collections.llm.gpt.model.base import GPTModel, gpt_forward_step

    given: list[Any] = []
    model = SimpleNamespace(
        config=SimpleNamespace(forward_step_fn=lambda _, batch: gpt_forward_step(run, batch))
    )

    def run(**batch: Any) -> None:
        given.append(batch["attention_mask"])

    batch = {name: torch.zeros(1, 2) for name in ("tokens", "position_ids", "labels")}
    breaks(lambda: GPTModel.forward_step(model, batch))
    gap()
    GPTModel.forward_step(model, batch)
    GPTModel.forward_step(model, {**batch, "attention_mask": "a mask"})
    assert given == [None, "a mask"]
