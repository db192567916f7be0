"""NeMo 1's LoRA adapters beside a Megatron model's linears, and merged into them."""

from collections.abc import Iterator
from typing import Any

import torch

from nemo_minitron import parallel

# Adapter, where it is, whose output it is added to, and whether that linear's input is sharded (row-parallel) over the
# tensor-parallel ranks, as its output is otherwise (peft_config.py, nemo_toolkit@2.4.1).
_PLACES = (
    ("lora_kqv_adapter", "self_attention", "linear_qkv", False),
    ("lora_dense_attention_adapter", "self_attention", "linear_proj", True),
    ("lora_hto4h_adapter", "mlp", "linear_fc1", False),
    ("lora_4htoh_adapter", "mlp", "linear_fc2", True),
)


def attach(model: Any) -> None:
    """Let each adapter add to its linear's output, by a hook.

    NeMo 1's mixins (mcore_mixins.py, nemo_toolkit@2.4.1) repeat the forward passes of an older attention and MLP, which
    megatron-core 0.13 calls with other arguments, and without the norms of queries and keys. So those classes get
    megatron-core's own passes back; parameters, enabling, freezing and saving of adapters stay NeMo's.

    Args:
        model: an Aligner model after `init_peft`.
    """
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP
    from nemo.collections.nlp.modules.common.megatron.adapters import mcore_mixins

    mcore_mixins.MCoreSelfAttentionMixin.forward = SelfAttention.forward
    mcore_mixins.MCoreSelfAttentionMixin.get_query_key_value_tensors = (
        SelfAttention.get_query_key_value_tensors
    )
    mcore_mixins.MCoreMLPMixin.forward = MLP.forward
    for owner, name, linear, _ in _adapted(model):
        linear.adapter_hook = linear.register_forward_hook(_adder(owner, name))


def _adder(owner: Any, name: str) -> Any:
    def add(linear: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
        result, bias = output
        # A linear with a norm inside of it (Transformer Engine) also gives the norm's output, the adapter's input.
        result, x = result if isinstance(result, tuple) else (result, inputs[0])
        if not owner.adapter_cfg[name]["enabled"]:
            return result, bias
        return result + owner.adapter_layer[name](x), bias

    return add


def merge(model: Any) -> int:
    """Add each adapter's product into its linear's weight, and take the adapters away; the model computes the same.

    Every tensor-parallel rank makes this call; each changes its own shard of the weights.

    Args:
        model: an Aligner model after `init_peft`.

    Returns:
        how many adapters this rank merged.
    """
    found = list(_adapted(model))
    with torch.no_grad():
        for owner, name, linear, row_parallel in found:
            linear.weight += _product(owner.adapter_layer[name], row_parallel).to(linear.weight.dtype)
            linear.adapter_hook.remove()
    for owner in {id(owner): owner for owner, *_ in found}.values():
        del owner.adapter_layer
    return len(found)


def _adapted(model: Any) -> Iterator[tuple[Any, str, Any, bool]]:
    """Owner and name of each adapter, its linear, and whether that is row-parallel."""
    for module in model.get_model_module_list():
        for layer in module.decoder.layers:
            for name, place, linear, row_parallel in _PLACES:
                owner = getattr(layer, place)
                if name in getattr(owner, "adapter_layer", {}):
                    yield owner, name, getattr(owner, linear), row_parallel


def _product(adapter: Any, row_parallel: bool) -> torch.Tensor:
    """[out/tp, in] of a column-parallel linear, [out, in/tp] of a row-parallel one, in fp32.

    `linear_in` is [dim/tp, in] or [dim, in/tp], `linear_out` [out/tp, dim].
    """
    down, up = adapter.linear_in.weight.float(), adapter.linear_out.weight.float()
    if row_parallel:
        up = torch.cat(parallel.all_gather_tp(up))
    else:
        down = torch.cat(parallel.all_gather_tp(down))
    return up @ down * (adapter.alpha / adapter.dim)
