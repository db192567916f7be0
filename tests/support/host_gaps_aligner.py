"""The proofs of nemo_minitron/cpu_compat/aligner.py's stand-ins; tests.support.host_gaps runs them after its own."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch

from nemo_minitron.cpu_compat import aligner
from tests.support.host_gaps import (
    breaks,
    close,
    forked,
    seeds_model_parallel_states,
    shows,
    weights_with_gradients,
)


@shows("aligner")
def strategy_wants_apex(gap: Callable[[], None]) -> None:
    from nemo.collections.nlp.parts import nlp_overrides

    breaks(nlp_overrides.NLPDDPStrategy, ImportError)
    gap()
    assert nlp_overrides.NLPDDPStrategy().no_ddp_communication_hook is False
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert not isinstance(plain, nlp_overrides.MegatronDistributedFusedAdam)


@shows("aligner")
def layer_specs_need_transformer_engine(gap: Callable[[], None]) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    config = SimpleNamespace(
        num_moe_experts=None, moe_grouped_gemm=False, qk_layernorm=False, normalization="RMSNorm"
    )
    breaks(lambda: megatron_gpt_model.get_specs("", config, use_te=False), Exception)
    gap()
    spec = megatron_gpt_model.get_specs("", config, use_te=False)
    assert spec.submodules.mlp.submodules.linear_fc1 is ColumnParallelLinear
    breaks(lambda: megatron_gpt_model.get_specs("megatron_gemma2", config), ValueError)


@shows("aligner")
def apex_attributes_of_megatron(gap: Callable[[], None]) -> None:
    from nemo.collections.nlp.modules.common.megatron import build_model

    build = lambda: build_model.build_model(lambda **_: torch.nn.Linear(2, 2), wrap_with_ddp=False)  # noqa: E731
    breaks(build, NameError)
    gap()
    (made,) = build()
    assert [parameter.tensor_model_parallel for parameter in made.parameters()] == [False, False]


@shows("aligner")
def apex_norms_and_lists(gap: Callable[[], None]) -> None:
    from nemo.collections.nlp.modules.common.megatron import utils

    from nemo_minitron.cpu_compat.norm import HostNorm

    config = SimpleNamespace(
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=False,
        params_dtype=torch.float32,
        sequence_parallel=False,
    )
    linear, norm = torch.nn.Linear(3, 3), HostNorm(config, 3)
    model = torch.nn.Sequential(linear, norm)
    breaks(lambda: utils.get_params_for_weight_decay_optimization(model), NameError)
    gap()
    for given in (model, [model]):
        decay, none = utils.get_params_for_weight_decay_optimization(given)
        assert [id(p) for p in decay["params"]] == [id(linear.weight)]
        assert {id(p) for p in none["params"]} == {id(p) for p in (linear.bias, norm.weight, norm.bias)}
        assert none["weight_decay"] == 0.0


@shows("aligner")
def clipping_wants_apex(gap: Callable[[], None]) -> None:
    from nemo.collections.nlp.modules.common.megatron import clip_grads

    assert not hasattr(clip_grads, "multi_tensor_applier")
    gap()
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.amp_C.multi_tensor_l2norm, None, [gradients], False)
    assert float(norm) == 13.0


@shows("aligner")
def clipping_wants_cuda_gradients(gap: Callable[[], None]) -> None:
    from nemo.collections.nlp.modules.common.megatron import clip_grads

    aligner.clipping_wants_apex()
    breaks(lambda: clip_grads.clip_grad_norm_fp32(weights_with_gradients(), 1.3))
    gap()
    for limit, factor in ((1.3, 0.1), (20.0, 1.0)):
        weights = weights_with_gradients()
        for weight in weights:
            weight.shared = False
            weight.tensor_model_parallel = True
        assert float(clip_grads.clip_grad_norm_fp32(weights, limit)) == 13.0
        for clipped, before in zip(weights, weights_with_gradients(), strict=True):
            close(clipped.grad, before.grad.double() * factor)


@shows("aligner")
def random_states_are_added_for_gpus_only(gap: Callable[[], None]) -> None:
    name = "nemo.collections.nlp.modules.common.megatron.megatron_init"
    seeds_model_parallel_states(importlib.import_module(name), gap)
    assert forked().shape == (4,)


@shows("aligner")
def loaded_tensors_are_moved_to_cuda(gap: Callable[[], None]) -> None:
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    strategy, checkpoint = NLPDDPStrategy(), {"weight": torch.ones(2)}
    breaks(lambda: strategy._fix_tensors_device(checkpoint))
    gap()
    assert torch.equal(strategy._fix_tensors_device(checkpoint)["weight"], torch.ones(2))


@shows("aligner")
def aligner_counts_on_cuda(gap: Callable[[], None]) -> None:
    from nemo_aligner.utils import distributed

    timer = distributed.Timer("0:00:01:00")
    timer.start_time()
    breaks(timer.is_finished)
    gap()
    assert timer.is_finished() is False
    late = distributed.Timer("0:00:00:00")
    late.start_time()
    assert late.is_finished() is True


@shows("aligner")
def adamw_step_cannot_be_sharded(gap: Callable[[], None]) -> None:
    """That it computes what AdamW does, also resumed: tests/functional/test_aligner_host.py."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS, get_optimizer

    weight = torch.nn.Parameter(torch.ones(3))
    sharded = ShardedTensor.from_rank_offsets("weight", weight.data)

    def saved_states(optimizer: torch.optim.Optimizer) -> list[str]:
        weight.grad = torch.ones(3)
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        return [make_sharded_optimizer_tensor(sharded, value, name).key for name, value in state.items()]

    breaks(lambda: saved_states(torch.optim.AdamW([weight])))
    assert "sharded_adamw" not in AVAILABLE_OPTIMIZERS
    gap()
    names = saved_states(get_optimizer("sharded_adamw")([weight], lr=0.1))
    assert names == ["exp_avg.weight", "exp_avg_sq.weight"]


@shows("aligner")
def generation_moves_the_model_to_cuda(gap: Callable[[], None]) -> None:
    import lightning.pytorch

    module = lightning.pytorch.LightningModule()
    module.linear = torch.nn.Linear(2, 2)
    breaks(module.cuda, TypeError)
    gap()
    assert module.cuda() is module
    assert module.linear.weight.device.type == module.device.type == "cpu"


@shows("aligner")
def pairs_are_collated_with_a_mask(gap: Callable[[], None]) -> None:
    from nemo_aligner.algorithms import dpo

    pairs = [
        {
            **{f"{side}": torch.arange(5) for side in ("chosen", "rejected")},
            **{f"{side}_labels": torch.arange(5) for side in ("chosen", "rejected")},
            **{f"{side}_length": 5 for side in ("chosen", "rejected")},
            **{f"{side}_reward": 1.0 for side in ("chosen", "rejected")},
        }
    ] * 2
    before = dpo.dpo_custom_collate(pairs, eos_id=0)
    assert before["attention_mask"].shape == (2, 1, 5, 5)
    gap()
    after = dpo.dpo_custom_collate(pairs, eos_id=0)
    assert after["attention_mask"].numel() == 2
    for name in set(before) - {"attention_mask"}:
        assert torch.equal(before[name], after[name]), name
    kept = dpo.dpo_custom_collate(pairs, eos_id=0, reset_attention_mask=True)
    assert torch.equal(kept["attention_mask"][0, 0, 1:, 0], torch.ones(4, dtype=torch.bool))
