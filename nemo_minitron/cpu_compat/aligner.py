"""Gaps of NeMo 1 (nemo_toolkit 2.4.1) and NeMo-Aligner 0.7.0 without CUDA, Transformer Engine and Apex."""

import importlib
from typing import Any

import torch

from nemo_minitron.cpu_compat import attention
from nemo_minitron.cpu_compat.cuda_names import show_cpu_torch_to
from nemo_minitron.cpu_compat.megatron import FusedAdamW
from nemo_minitron.cpu_compat.norm import HostNorm
from nemo_minitron.errors import InputError


def close_gaps() -> None:
    """Apply every gap of this file, in order."""
    close_apexs()
    close_transformer_engines()
    clipping_wants_cuda_gradients()
    random_states_are_added_for_gpus_only()
    loaded_tensors_are_moved_to_cuda()
    aligner_counts_on_cuda()
    generation_moves_the_model_to_cuda()


def close_apexs() -> None:
    """Those without Apex, with CUDA or not."""
    strategy_wants_apex()
    apex_attributes_of_megatron()
    apex_norms_and_lists()
    clipping_wants_apex()


def close_transformer_engines() -> None:
    """Those of the local layers, with CUDA or not."""
    layer_specs_need_transformer_engine()
    pairs_are_collated_with_a_mask()
    adamw_step_cannot_be_sharded()


def strategy_wants_apex() -> None:
    """`NLPDDPStrategy` raises unless Apex is there (`nlp_overrides.py:219`), and when it saves it asks whether the
    optimizer is a `MegatronDistributedFusedAdam` (`:345`), whose import needs Apex too. It uses nothing else of Apex,
    and no optimizer here can be of that class."""
    from nemo.collections.nlp.parts import nlp_overrides
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    nlp_overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    nlp_overrides.MegatronDistributedFusedAdam = type("MegatronDistributedFusedAdam", (), {})
    nlp_overrides.HAVE_APEX = True


def layer_specs_need_transformer_engine() -> None:
    """`megatron_gpt_model.get_specs` builds every layer spec it knows before it takes one, so also the local one fails
    in those of Transformer Engine; and it names no normalization, which makes the local spec's norms LayerNorm."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    def get_specs(
        spec_name: str, transformer_config: Any = None, use_te: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if spec_name not in ("", "te_gpt"):
            raise InputError(
                f"model.name: {spec_name!r} needs Transformer Engine; here '' (or 'te_gpt') is legal"
            )
        return get_gpt_layer_local_spec(
            transformer_config.num_moe_experts,
            transformer_config.moe_grouped_gemm,
            qk_layernorm=transformer_config.qk_layernorm,
            normalization=transformer_config.normalization,
        )

    megatron_gpt_model.get_specs = get_specs


def apex_attributes_of_megatron() -> None:
    """`build_model.py` marks the parameters' tensor-parallel attributes with a function that it imports from Apex;
    megatron-core has the same one."""
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.modules.common.megatron import build_model

    name = "set_defaults_if_not_set_tensor_model_parallel_attributes"
    setattr(build_model, name, set_defaults_if_not_set_tensor_model_parallel_attributes)


def apex_norms_and_lists() -> None:
    """`megatron/utils.py:366` sorts parameters into those with and without weight decay by `listify_model` and by
    Apex's norm classes, names that exist only with Apex. Norms here are `HostNorm`s; like theirs, a norm's parameters
    and all biases do not decay."""
    from nemo.collections.nlp.modules.common.megatron import utils

    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    utils.FusedLayerNorm = utils.FastLayerNorm = utils.MixedFusedRMSNorm = HostNorm


def clipping_wants_cuda_gradients() -> None:
    """NeMo 1's `clip_grads.py` asserts `torch.cuda.FloatTensor` gradients (`:101`) and writes `device="cuda"`. The loss
    scaler (`nlp_overrides.py:1710`) writes "cuda" as well."""
    names = ("modules.common.megatron.clip_grads", "parts.nlp_overrides")
    show_cpu_torch_to(*(importlib.import_module(f"nemo.collections.nlp.{name}") for name in names))


def clipping_wants_apex() -> None:
    """NeMo 1's `clip_grads.py` takes the norm of a list of gradients from Apex."""
    from nemo.collections.nlp.modules.common.megatron import clip_grads

    def apply(operation: Any, overflow: Any, tensor_lists: list[list[torch.Tensor]], *args: Any) -> Any:
        return operation(tensor_lists[0]), None

    clip_grads.multi_tensor_applier = apply
    clip_grads.amp_C = _AmpC


class _AmpC:
    """The one operation of Apex's `amp_C` that clipping calls."""

    multi_tensor_l2norm = staticmethod(torch.nn.utils.get_total_norm)


def random_states_are_added_for_gpus_only() -> None:
    """`megatron_init._set_random_seed` (NeMo 1, `:221`) adds Megatron's model-parallel random states only where it
    counts a GPU; without them `get_cuda_rng_tracker().fork()` raises in the first attention."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo.collections.nlp.modules.common.megatron import megatron_init

    seed_generators = megatron_init._set_random_seed

    def seed_all(seed: int) -> None:
        seed_generators(seed)
        model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())

    megatron_init._set_random_seed = seed_all


def loaded_tensors_are_moved_to_cuda() -> None:
    """`NLPDDPStrategy._fix_tensors_device` (`nlp_overrides.py:471`) asserts that CUDA is initialised."""
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    NLPDDPStrategy._fix_tensors_device = lambda self, checkpoint: checkpoint


def aligner_counts_on_cuda() -> None:
    """`nemo_aligner.utils.distributed` writes `device="cuda"` in its timers (`:778`, `:917`: every step of every
    trainer) and broadcasts (`:121`)."""
    show_cpu_torch_to(importlib.import_module("nemo_aligner.utils.distributed"))


def connect_ranks(trainer: Any, model_cfg: Any) -> None:
    """Start torch.distributed and Megatron's groups; to be called between the trainer and the model, with CUDA or not.

    NeMo 1 builds the model first and starts the groups in `init_distributed`; but megatron-core 0.13's layers ask for
    their process groups while they are built. `init_distributed` later finds them there.

    Args:
        trainer: what `resolve_and_create_trainer` gave.
        model_cfg: the model's config, for its `*_parallel_size` keys (absent: 1).
    """
    from megatron.core import parallel_state

    trainer.strategy.setup_environment()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=model_cfg.get("tensor_model_parallel_size", 1),
            pipeline_model_parallel_size=model_cfg.get("pipeline_model_parallel_size", 1),
            context_parallel_size=model_cfg.get("context_parallel_size", 1),
        )


class ShardedAdamW(FusedAdamW):
    """torch's AdamW with the step count in its state dict's param groups, where `state` has parameter shapes only."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's, but that `step` is an int of each param group; a group that took no step has none."""
        saved = super().state_dict()
        state = {key: dict(values) for key, values in saved["state"].items()}
        for group in saved["param_groups"]:
            steps = {int(state[key].pop("step")) for key in group["params"] if "step" in state.get(key, {})}
            assert len(steps) <= 1, f"parameters of one group took different numbers of steps: {steps}"
            if steps:
                group["step"] = steps.pop()
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accepts what `state_dict` gives."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = {key: dict(values) for key, values in state_dict["state"].items()}
        for group in groups:
            step = group.pop("step", 0)
            for key in group["params"]:
                if key in state:
                    state[key]["step"] = torch.tensor(float(step))
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})


def adamw_step_cannot_be_sharded() -> None:
    """megatron-core's `make_sharded_optimizer_tensor` asserts that every optimizer state has its parameter's shape; the
    step of torch's AdamW is a 0-dim tensor, and Apex's FusedAdam, which keeps it in the param group, needs CUDA. So
    configs here say `optim.name: sharded_adamw`."""
    from nemo.core.config.optimizers import AdamWParams
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS, register_optimizer

    if "sharded_adamw" not in AVAILABLE_OPTIMIZERS:
        register_optimizer("sharded_adamw", ShardedAdamW, AdamWParams)


def generation_moves_the_model_to_cuda() -> None:
    """`MegatronGPTModel.generate` (NeMo 1, `:1920`) calls `cuda()` of the whole model, for which Lightning has a method
    of its own (`device_dtype_mixin.py:58`) that makes a CUDA device out of the current one's number."""
    from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin

    _DeviceDtypeModuleMixin.cuda = lambda self, device=None: self


def pairs_are_collated_with_a_mask() -> None:
    """`dpo_custom_collate` (`algorithms/dpo.py:95`) makes a float32 [s, s] and a bool [b, 1, s, s] for each microbatch,
    256 MiB and more at 8,192 tokens, that says no more than that attention is causal. `HostAttention` knows that."""
    if not attention.is_wanted():
        return
    from nemo_aligner.algorithms import dpo

    make = dpo.get_ltor_masks_and_position_ids

    def without_mask(
        data: torch.Tensor, eod_token: int, reset_position_ids: bool, reset_attention_mask: bool, *more: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if reset_position_ids or reset_attention_mask:
            return make(data, eod_token, reset_position_ids, reset_attention_mask, *more)  # type: ignore[no-any-return]
        positions = torch.arange(data.size(1), device=data.device).expand_as(data)
        # The collate function asserts four dimensions, and does nothing with the second.
        return attention.no_mask(data.device), torch.ones_like(data, dtype=torch.float32), positions

    dpo.get_ltor_masks_and_position_ids = without_mask
