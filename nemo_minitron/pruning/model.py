"""Carries out a plan on the shards of a Megatron GPTModel."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Identity, Parameter

from nemo_minitron import parallel
from nemo_minitron.axes import WIDTH_AXES
from nemo_minitron.errors import InputError
from nemo_minitron.megatron_gpt import gpt_model
from nemo_minitron.pruning import depth, rebuild, width
from nemo_minitron.pruning.plan import PrunePlan
from nemo_minitron.pruning.target import check_target


@torch.no_grad()
def prune(chunks: Sequence[Any], plan: PrunePlan) -> None:
    """Make a model smaller, in place and sharded as it is: width, depth, or both at once.

    Every rank of the model calls this with its own shards, before a gradient buffer or an optimizer is
    built on the parameters: they are all replaced. Forward, `sharded_state_dict` and further training then
    see a model of the target's sizes. Each weight is read once; memory beyond the model stays below one
    layer's weights.

    Args:
        chunks: this rank's GPTModels (megatron-core), one, or one for each virtual pipeline stage; wrappers
            that keep the model in `.module` are looked through. Their TransformerConfig is changed in place
            too: a model that shares it and is not pruned here would be left with wrong sizes.
        plan: any layout's; its source has this model's sizes.

    Raises:
        InputError: a plan for another model, a target that this layout cannot hold, a model with parameters
            that pruning does not know. Nothing was touched then.
    """
    models = [_gpt_model(chunk) for chunk in chunks]
    check_model(models, plan)
    specs = [rebuild.layer_spec(model) for model in models]
    device = next(itertools.chain.from_iterable(model.parameters() for model in models)).device
    held = _thin_layers(models, plan, device)
    outer = [_thin_outer(model, plan, device) for model in models]
    _update_configs(models, plan)
    wanted = [_own_layers(model) for model in models]
    depth.move_layers(held, [layer for layers in wanted for layer in layers], device)
    for model, spec, layers, parameters in zip(models, specs, wanted, outer, strict=True):
        built = [rebuild.build_layer(model, spec, i + 1, held.pop(layer)) for i, layer in enumerate(layers)]
        rebuild.set_layers(model, spec, built)
        _set_outer(model, parameters)


def check_model(models: Sequence[Any], plan: PrunePlan) -> None:
    """Refuse what `prune` cannot do, before it does anything.

    Raises:
        InputError: see `prune`.
    """
    config, source = models[0].config, plan.source
    for name in (*WIDTH_AXES, "num_layers", "kv_channels", "gated_linear_unit"):
        if getattr(config, name) != getattr(source, name):
            raise InputError(
                f"{name}={getattr(config, name)}: the plan is for a model with {getattr(source, name)}; "
                "prune the model that was scored"
            )
    vp = config.virtual_pipeline_model_parallel_size
    check_target(source, plan.target, tp=parallel.tp_size(), pp=parallel.pp_size(), vp=vp)
    for model in models:
        width.check_parameters(model)


def _gpt_model(chunk: Any) -> Any:
    inner = chunk
    while hasattr(inner, "module"):
        # Megatron's DDP owns the parameters' memory in buffers of the old size.
        assert not hasattr(inner, "ddp_config"), (
            "prune before the model is wrapped in DistributedDataParallel"
        )
        inner = inner.module
    return gpt_model(chunk)


def _thin_layers(
    models: Sequence[Any], plan: PrunePlan, device: torch.device
) -> dict[int, depth.LayerParameters]:
    """The kept layers' parameters, cut, by their number in the target; old layers are released one by one."""
    position = {source: target for target, source in enumerate(plan.source_layers)}
    held: dict[int, depth.LayerParameters] = {}
    for model in models:
        layers = model.decoder.layers
        for i in range(len(layers)):
            layer, layers[i] = layers[i], Identity()
            if (target := position.get(layer.layer_number - 1)) is not None:
                held[target] = _thin_layer(layer, plan, target, device)
    return held


def _thin_layer(layer: Any, plan: PrunePlan, target: int, device: torch.device) -> depth.LayerParameters:
    chosen = width.selections(plan, target, device)
    thin = {}
    for name, parameter in layer.named_parameters():
        axes = width.LAYER_AXES[name]
        if plan.head_residual is not None and "qkv" in axes:
            parameter.data = width.add_head_residual(parameter.data, plan, target)
        thin[name] = width.cut(parameter, axes, chosen)
    return thin


def _thin_outer(model: Any, plan: PrunePlan, device: torch.device) -> dict[str, Parameter]:
    """Embeddings, output layer and final norm, cut."""
    chosen = width.hidden_selection(plan, device)
    return {
        name: width.cut(parameter, width.OUTER_AXES[name], chosen)
        for name, parameter in model.named_parameters()
    }


def _set_outer(model: Any, parameters: dict[str, Parameter]) -> None:
    hidden_size = model.config.hidden_size
    norm = "decoder.final_layernorm."
    if own := {name.removeprefix(norm): p for name, p in parameters.items() if name.startswith(norm)}:
        model.decoder.final_layernorm = rebuild.build_final_norm(model, own)
    for name, parameter in parameters.items():
        if not name.startswith(norm):
            rebuild.set_parameter(model, name, parameter)
    if hasattr(model, "embedding"):
        model.embedding.word_embeddings.embedding_dim = hidden_size
        if model.embedding.add_position_embedding:
            model.embedding.position_embeddings.embedding_dim = hidden_size
    if hasattr(model, "output_layer"):
        model.output_layer.input_size = hidden_size


def _update_configs(models: Sequence[Any], plan: PrunePlan) -> None:
    """Write the target's sizes into every config that a module of the model holds, be it one or copies."""
    modules = itertools.chain.from_iterable(model.modules() for model in models)
    found = {id(m.config): m.config for m in modules if hasattr(getattr(m, "config", None), "kv_channels")}
    for config in found.values():
        for name in WIDTH_AXES:
            setattr(config, name, getattr(plan.target, name))
        if plan.kept.layers is not None:
            depth.renumbered(config, plan.kept.layers)


def _own_layers(model: Any) -> list[int]:
    """The target's layers (0-based) that Megatron puts into this rank's chunk, by its config."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config, vp_stage = model.decoder.config, model.decoder.vp_stage
    first = get_transformer_layer_offset(config, vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage)))
