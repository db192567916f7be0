"""What the tests hold the code against: a GPT's forward pass in plain torch, single-process, and the real
Megatron model with the same weights under any parallel layout.

Weights are a dict of full (unsharded) tensors under Megatron's names with global layer numbers, such as
`decoder.layers.3.mlp.linear_fc1.weight`; all on the CPU. The forward pass is written from the papers (RoPE
2104.09864, GQA 2305.13245, RMSNorm 1910.07467), not from Megatron. Typical use, on ranks:

    at = layout(tp=2, sp=True)
    model = tiny_model(arch, sequence_parallel=at.sp)
    torch.testing.assert_close(forward_logits(model, tokens), Reference(full_weights(arch), arch)(tokens))
"""

import dataclasses
import math
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.arch import Architecture

Weights = dict[str, Tensor]

# ---- plain torch -------------------------------------------------------------------------------------------

_PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "squared_relu": lambda x: F.relu(x) ** 2,
}


class Reference:
    """`logits = Reference(weights, arch)(tokens)`; `kept` then holds the activations that scores stand on.

    `kept[layer]`: "ffn" [b, s, f] (input of fc2), "attention" [b, s, heads, d] (input of the projection),
    "norm1", "norm2" [b, s, h] (outputs of the norms), "in", "out" [b, s, h] (residual stream); `final_norm`
    [b, s, h].
    """

    def __init__(self, weights: Weights, arch: Architecture) -> None:
        self.weights, self.arch = local_names(weights), arch
        self.kept: list[dict[str, Tensor]] = []
        self.final_norm = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] to logits [b, s, v]."""
        x = F.embedding(tokens, self.weights["embedding.word_embeddings.weight"])
        if self.arch.position_embedding_type == "learned_absolute":
            x = x + self.weights["embedding.position_embeddings.weight"][: tokens.shape[1]]
        self.kept = []
        for number in range(self.arch.num_layers):
            x = self._layer(x, f"decoder.layers.{number}.")
        self.final_norm = self._norm(x, "decoder.final_layernorm.")
        tied = self.arch.share_embeddings_and_output_weights
        head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
        return self.final_norm @ self.weights[head].T

    def _layer(self, x: Tensor, name: str) -> Tensor:
        norm1 = self._norm(x, name + "input_layernorm.")
        attention = self._attention(norm1, name + "self_attention.")
        middle = x + self._linear(attention.flatten(2), name + "self_attention.linear_proj.")
        norm2 = self._norm(middle, name + "pre_mlp_layernorm.")
        ffn = self._activation(self._linear(norm2, name + "mlp.linear_fc1."))
        out = middle + self._linear(ffn, name + "mlp.linear_fc2.")
        self.kept.append(
            {"in": x, "norm1": norm1, "attention": attention, "norm2": norm2, "ffn": ffn, "out": out}
        )
        return out

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + "weight"], self.weights.get(name + "bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name + "weight"] + (1.0 if self.arch.layernorm_zero_centered_gamma else 0.0)
        if self.arch.normalization == "LayerNorm":
            x = x - x.mean(-1, keepdim=True)
        y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.arch.layernorm_epsilon) * weight
        return y + self.weights[name + "bias"] if name + "bias" in self.weights else y

    def _activation(self, x: Tensor) -> Tensor:
        function = _PLAIN[self.arch.activation]
        if not self.arch.gated_linear_unit:
            return function(x)
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """[b, s, h] -> [b, s, heads, d]; in qkv each group has its query heads, then its key, its value."""
        b, s = x.shape[:2]
        d, shared = self.arch.kv_channels, self.arch.heads_per_group
        qkv = self._linear(x, name + "linear_qkv.").view(b, s, self.arch.num_query_groups, shared + 2, d)
        q, k, v = qkv[..., :shared, :].flatten(2, 3), qkv[..., shared, :], qkv[..., shared + 1, :]
        if self.arch.qk_layernorm:
            q, k = self._norm(q, name + "q_layernorm."), self._norm(k, name + "k_layernorm.")
        if self.arch.position_embedding_type == "rope":
            q, k = self._rope(q), self._rope(k)
        k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(d)
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        return torch.einsum("bnqk,bknd->bqnd", scores.masked_fill(future, -torch.inf).softmax(-1), v)

    def _rope(self, x: Tensor) -> Tensor:
        """Rotate the pairs (i, i + r/2) of the first r channels of x [b, s, n, d]."""
        r = int(x.shape[-1] * self.arch.rotary_percent)
        angles = torch.outer(torch.arange(x.shape[1]).float(), self._frequencies(r))[None, :, None, :]
        cos, sin = angles.cos(), angles.sin()
        first, second, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def _frequencies(self, r: int) -> Tensor:
        """[r/2]; Llama 3.1's long-context scaling slows the low frequencies and blends in the middle."""
        f = self.arch.rotary_base ** (-torch.arange(0, r, 2).float() / r)
        if (factor := self.arch.rope_scaling_factor) is None:
            return f
        low, high = self.arch.rope_low_freq_factor, self.arch.rope_high_freq_factor
        turns = self.arch.rope_original_context * f / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return f / factor * (1 - blend) + f * blend


def local_names(weights: Weights) -> Weights:
    """The same weights with the Transformer Engine spec's fused norms under the local spec's names."""
    fused = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    for old, new in fused.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights


def full_weights(arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Random full weights, the same for the same seed; norms and biases are not at their trivial values."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, arch, generator).to(dtype) for name, shape in _shapes(arch).items()}


def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    h, f, v = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    linears = {
        "self_attention.linear_qkv": (arch.query_size + 2 * arch.key_value_size, h),
        "self_attention.linear_proj": (h, arch.query_size),
        "mlp.linear_fc1": (f * (2 if arch.gated_linear_unit else 1), h),
        "mlp.linear_fc2": (h, f),
    }
    norms, inner = ["decoder.final_layernorm"], []
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (v, h)}
    if arch.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (arch.max_position_embeddings, h)
    for name in [f"decoder.layers.{number}" for number in range(arch.num_layers)]:
        norms += [f"{name}.input_layernorm", f"{name}.pre_mlp_layernorm"]
        for linear, shape in linears.items():
            shapes[f"{name}.{linear}.weight"] = shape
            if arch.add_bias_linear or (arch.add_qkv_bias and linear.endswith("qkv")):
                shapes[f"{name}.{linear}.bias"] = shape[:1]
        if arch.qk_layernorm:
            inner += [f"{name}.self_attention.{which}_layernorm" for which in "qk"]
    for norm, width in [(norm, h) for norm in norms] + [(norm, arch.kv_channels) for norm in inner]:
        shapes[f"{norm}.weight"] = (width,)
        if arch.normalization == "LayerNorm":
            shapes[f"{norm}.bias"] = (width,)
    if not arch.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (v, h)
    return shapes


def _draw(name: str, shape: tuple[int, ...], arch: Architecture, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "layernorm.weight" in name:
        return 0.3 * noise + (0.0 if arch.layernorm_zero_centered_gamma else 1.0)
    # Layers that write as much to the residual stream as they read: no unit, and no layer, is negligible.
    return 0.3 * noise if name.endswith("bias") else noise / math.sqrt(shape[-1])


# ---- the real Megatron model -------------------------------------------------------------------------------


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_MEGATRON = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "squared_relu": squared_relu}


def model_config(arch: Architecture, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Megatron's TransformerConfig for arch under the parallel layout that is set up; its fusions are off."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    same = [field.name for field in dataclasses.fields(TransformerConfig) if hasattr(arch, field.name)]
    values = {
        **{name: getattr(arch, name) for name in same},
        "activation_func": _MEGATRON[arch.activation],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    return TransformerConfig(**{**values, **overrides})


def tiny_model(
    arch: Architecture,
    seed: int = 0,
    *,
    weights: Weights | None = None,
    sequence_parallel: bool = False,
    fused_norms: bool = False,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """The rank's part of Megatron's GPTModel, in eval mode, with `weights` (else `full_weights(arch, seed)`).

    `fused_norms` gives the layers the Transformer Engine spec's shape. `overrides` go to the config, such as
    `num_layers_in_first_pipeline_stage=1`. `arch.vocab_size` must be divisible by the tensor-parallel size.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    rope = arch.rope_scaling_factor
    model = GPTModel(
        config=model_config(arch, dtype, sequence_parallel=sequence_parallel, **overrides),
        transformer_layer_spec=_layer_spec(arch, fused_norms),
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_position_embeddings or 64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
        position_embedding_type=arch.position_embedding_type,
        rotary_base=int(arch.rotary_base),
        rotary_percent=arch.rotary_percent,
        **({} if rope is None else {"rope_scaling": True, "rope_scaling_factor": rope}),
    ).to(dtype)
    load_full(model, full_weights(arch, seed, dtype) if weights is None else weights)
    return model.eval()


def _layer_spec(arch: Architecture, fused_norms: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp

    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_layernorm, normalization=arch.normalization)
    if fused_norms:
        from tests.support.fused_linear import FusedNormLinear

        parts = spec.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attention.submodules.linear_qkv = FusedNormLinear
        parts.mlp.submodules.linear_fc1 = FusedNormLinear
        parts.sharded_state_dict_keys_map = {}
    return spec


_COLUMN = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
_GATED = ("linear_fc1.weight", "linear_fc1.bias")
_ROW = ("linear_proj.weight", "linear_fc2.weight")


def global_names(model: Any) -> dict[str, Tensor]:
    """The rank's parameters by name, layers numbered globally."""
    named = {}
    for name, parameter in model.named_parameters():
        if found := re.match(r"(.*layers\.)(\d+)(\..*)", name):
            number = model.get_submodule(found[1] + found[2]).layer_number - 1
            name = f"{found[1]}{number}{found[3]}"
        named[name] = parameter
    return named


def load_full(model: Any, weights: Weights) -> None:
    """Copy the rank's shards out of full weights (under the local spec's names or the fused ones)."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    weights = local_names(weights)
    for name, parameter in global_names(model).items():
        [local] = local_names({name: parameter})
        if local not in weights and local == "output_layer.weight":
            local = "embedding.word_embeddings.weight"
        full = weights[local]
        if local.endswith(_GATED) and model.config.gated_linear_unit:
            full = torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
        elif local.endswith(_COLUMN + _GATED):
            full = full.chunk(size)[rank]
        elif local.endswith(_ROW):
            full = full.chunk(size, dim=1)[rank]
        with torch.no_grad():
            parameter.copy_(full)


def full_state_dict(model: Any) -> Weights:
    """The unsharded weights, gathered over tensor and pipeline ranks, on every rank, without a tied head."""
    from megatron.core import parallel_state

    own = {name: t.detach().clone() for name, t in global_names(model).items()}
    shards = _gather(own, parallel_state.get_tensor_model_parallel_group())
    joined = {name: _join(name, [s[name] for s in shards], model.config.gated_linear_unit) for name in own}
    full: Weights = {}
    for stage in _gather(joined, parallel_state.get_pipeline_model_parallel_group()):
        full |= stage
    if (
        model.share_embeddings_and_output_weights
        and (head := full.pop("output_layer.weight", None)) is not None
    ):
        assert torch.equal(head, full["embedding.word_embeddings.weight"]), "the stages' tied weights differ"
    return full


def _join(name: str, shards: list[Tensor], gated: bool) -> Tensor:
    if name.endswith(_GATED) and gated:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    if name.endswith(_COLUMN + _GATED):
        return torch.cat(shards)
    if name.endswith(_ROW):
        return torch.cat(shards, dim=1)
    assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs between tensor ranks"
    return shards[0]


def _gather(value: Any, group: Any) -> list[Any]:
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def forward_logits(model: Any, tokens: Tensor, micro_batch_size: int | None = None) -> Tensor:
    """Token ids [b, s] (the data-parallel rank's own) through Megatron's forward-only schedule.

    Returns:
        Logits [b, s, v], global over tensor and pipeline ranks, on every rank.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    micro_batches = tokens.split(micro_batch_size or len(tokens))
    even = len({len(micro_batch) for micro_batch in micro_batches}) == 1
    assert even or parallel_state.get_pipeline_model_parallel_world_size() == 1, (
        "stages need equal microbatches"
    )
    with torch.no_grad():
        shards = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=tokens.shape[1],
            micro_batch_size=len(micro_batches[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )
    stages = _gather(
        torch.cat(shards) if shards else None, parallel_state.get_pipeline_model_parallel_group()
    )
    return torch.cat(_gather(stages[-1], parallel_state.get_tensor_model_parallel_group()), dim=-1)


def _forward_step(micro_batches: Any, model: Any) -> Any:
    tokens = next(micro_batches)
    s = tokens.shape[1]
    positions = torch.arange(s).expand_as(tokens)
    future = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    logits = model(tokens, positions, future)
    return logits, lambda output, non_loss_data: output
