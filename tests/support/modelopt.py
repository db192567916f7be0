"""ModelOpt's own importance estimators (nvidia-modelopt@0.47.0 torch/prune/plugins/mcore_minitron.py) on the CPU.

Its plugin does not import here: its dynamic modules need Transformer Engine and a newer megatron-core. Only their
classes are replaced, by Megatron's own, so that ModelOpt's registry finds the modules of a plain GPTModel; its hooks
and estimators, which are what is compared with, run as they are.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_PLUGIN, _STATS = "modelopt.torch.nas.plugins.megatron", "modelopt.torch.nas.plugins.megatron_model_stats"


class _Hyperparameter:
    """The part of ModelOpt's hyperparameters that its estimators use."""

    def __init__(self, largest: int) -> None:
        self.max = largest
        self.importance: Callable[[], Tensor]

    def register_importance(self, function: Callable[[], Tensor]) -> None:
        self.importance = function


def _no_class(name: str) -> type:
    return type(name, (), {})


def _stand_ins() -> dict[str, ModuleType]:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    ours = {
        "_DynamicMCoreLanguageModel": GPTModel,
        "_DynamicTransformerLayer": TransformerLayer,
        "_DynamicSelfAttention": SelfAttention,
        "_DynamicAttention": SelfAttention,
        "_DynamicMLP": MLP,
        # ModelOpt looks for a norm module of its own before the MLP in mixtures of experts only; the local spec has it.
        "_DynamicMoELayer": MLP,
        "SUPPORTED_MODELS": {},
    }
    plugin, stats = ModuleType(_PLUGIN), ModuleType(_STATS)
    for name in ("MambaLayer", "MambaMixer", "SequentialMLP", "TEGroupedMLP"):
        setattr(plugin, f"_Dynamic{name}", _no_class(name))
    vars(plugin).update(ours)
    for name in ("mcore_memory_footprint_mb", "mcore_param_count", "parse_main_layer_chars"):
        setattr(stats, name, None)
    stats.print_mcore_model_stats = None  # type: ignore[attr-defined]
    return {_PLUGIN: plugin, _STATS: stats}


def _mcore_minitron() -> Any:
    name = "modelopt.torch.prune.plugins.mcore_minitron"
    if name in sys.modules:
        return sys.modules[name]
    from modelopt.torch.opt import config

    stand_ins = _stand_ins()
    sys.modules.update(stand_ins)
    try:
        # Its search space, of the dynamic modules, is not needed.
        with mock.patch.object(config, "get_kwargs_for_create_model_with_rules", return_value={}):
            module: Any = importlib.import_module(name)
    finally:
        for stand_in in stand_ins:
            del sys.modules[stand_in]
    # Without Transformer Engine megatron-core has a mock in its place, and no module is one.
    module.TELayerNormColumnParallelLinear = _no_class("TELayerNormColumnParallelLinear")
    return module


def modelopt_scores(model: Any, forward: Callable[[], Any]) -> dict[str, Any]:
    """What ModelOpt's registry makes of a Megatron GPTModel (one rank, local spec) during `forward`.

    Returns:
        "hidden_size" [h]; "ffn_hidden_size" [layers, f]; "num_attention_heads" [layers, heads], the heads group by
        group, best first; "layers": 1 - cosine, summed over forward passes, [layers].
    """
    hyperparameters: dict[tuple[int, str], _Hyperparameter] = {}
    config = model.config
    largest = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
    }

    def hyperparameter(module: Any, name: str) -> _Hyperparameter:
        return hyperparameters.setdefault((id(module), name), _Hyperparameter(largest[name]))

    for module in model.modules():
        module._register_temp_attribute = partial(setattr, module)
        module.get_hparam = partial(hyperparameter, module)
        module.hparam_name, module._has_fused_input_layernorm = "ffn_hidden_size", False
        module._prunes_attention_heads = lambda: True
    registry = _mcore_minitron().ImportanceEstimatorRegistry(model)
    forward()
    registry.cleanup()

    def importance(modules: list[Any], name: str) -> Tensor:
        return torch.stack([hyperparameters[id(module), name].importance() for module in modules])

    layers = model.decoder.layers
    return {
        "hidden_size": importance([model], "hidden_size")[0],
        "ffn_hidden_size": importance([layer.mlp for layer in layers], "ffn_hidden_size"),
        "num_attention_heads": importance([layer.self_attention for layer in layers], "num_attention_heads"),
        "layers": torch.tensor([layer._scores for layer in layers]),
    }
