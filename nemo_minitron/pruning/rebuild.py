"""Megatron's own modules, built anew around given parameters.

A module caches its sizes in many places, and differently under each layer spec. Megatron builds it from the
new config instead, without memory, and the pruned parameters are put in: their shapes must then agree.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter

from nemo_minitron.errors import InputError


def layer_spec(model: Any) -> Any:
    """The spec of the layers of a GPTModel (any stage's; all layers are alike).

    Raises:
        InputError: a stage without layers whose spec cannot be told.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    if specs := model.decoder.submodules.layer_specs:
        return specs[0]
    if isinstance(model.transformer_layer_spec, ModuleSpec):
        return model.transformer_layer_spec
    raise InputError("a pipeline stage has no layers, and no spec to build one from; use another layout")


def build_layer(model: Any, spec: Any, number: int, parameters: Mapping[str, Parameter]) -> Module:
    """One transformer layer of a GPTModel whose config has the new sizes.

    Args:
        model: a megatron-core GPTModel.
        spec: from `layer_spec`.
        number: 1-based, inside this stage (and virtual stage); Megatron adds the stage's offset.
        parameters: all of the layer, this rank's shards.
    """
    from megatron.core.transformer.spec_utils import build_module

    block = model.decoder
    with _no_memory(block.config):
        layer = build_module(
            spec,
            config=block.config,
            layer_number=number,
            vp_stage=block.vp_stage,
            **_process_groups(block),
        )
    return _filled(layer, parameters, model.training)


def _process_groups(block: Any) -> dict[str, Any]:
    """A block's process groups by the name that its layers take them by: megatron-core 0.13's, or from 0.16 on."""
    name = "pg_collection" if hasattr(block, "pg_collection") else "model_comm_pgs"
    return {name: getattr(block, name)}


def build_final_norm(model: Any, parameters: Mapping[str, Parameter]) -> Module:
    """The norm after the last layer of a GPTModel whose config has the new sizes."""
    from megatron.core.transformer.spec_utils import build_module

    config = model.decoder.config
    with _no_memory(config):
        norm = build_module(
            model.decoder.submodules.layer_norm,
            config=config,
            hidden_size=config.hidden_size,
            eps=config.layernorm_epsilon,
        )
    return _filled(norm, parameters, model.training)


def set_layers(model: Any, spec: Any, layers: list[Module]) -> None:
    """Put new layers into a GPTModel's block."""
    block = model.decoder
    block.layers = torch.nn.ModuleList(layers).train(model.training)
    block.num_layers_per_pipeline_rank = len(layers)
    block.submodules = dataclasses.replace(block.submodules, layer_specs=[spec] * len(layers))


def set_parameter(root: Module, name: str, parameter: Parameter) -> None:
    """Replace the parameter of that dotted name."""
    owner, _, last = name.rpartition(".")
    root.get_submodule(owner)._parameters[last] = parameter


def _filled(module: Module, parameters: Mapping[str, Parameter], training: bool) -> Module:
    """The module with these parameters in place of its own."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    given = {name: tuple(p.shape) for name, p in parameters.items()}
    assert shapes == given, f"Megatron builds {shapes}, pruning made {given}"
    for name, parameter in parameters.items():
        set_parameter(module, name, parameter)
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer without values"
    return module.train(training)


@contextlib.contextmanager
def _no_memory(config: Any) -> Iterator[None]:
    """Inside, modules are built from `config` on the meta device and nothing is initialised."""
    names = ("perform_initialization", "use_cpu_initialization", "init_model_with_meta_device")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    te = _transformer_engine()
    config.perform_initialization = False
    # Transformer Engine's modules name their device, and only this flag makes it the meta device.
    config.init_model_with_meta_device = te
    config.use_cpu_initialization = not te
    try:
        with torch.device("meta"):
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _transformer_engine() -> bool:
    from megatron.core.transformer import transformer_block

    return bool(transformer_block.HAVE_TE)
