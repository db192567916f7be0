"""Memory, FLOPs and layouts before anything runs: against Megatron's model, torch's counters, published numbers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.sizes import sizes_of
from nemo_minitron.config.plan import GPUS, HERE, PlanConfig
from nemo_minitron.errors import InputError
from nemo_minitron.planning import machines
from nemo_minitron.planning.layouts import layouts, options, step_flops
from nemo_minitron.planning.machines import GIB, Cluster, gpu
from nemo_minitron.planning.memory import (
    Layout,
    Training,
    kept_values,
    parameters_on_rank,
    streamed_memory,
    training_memory,
)
from nemo_minitron.workflows.plan_run.check import cluster_of
from nemo_minitron.workflows.plan_run.work import Models, work_of
from tests.support.pruning_models import FAMILIES, LLAMA

ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = Architecture(32, 4096, 14336, 32, 8, 128, vocab_size=128256)
WIDTH_4B = LLAMA_8B.replace(hidden_size=3072, ffn_hidden_size=9216)
# arXiv 2408.11796: 94B tokens in batches of 1152 sequences of 8192, on 32 nodes of 8.
PAPER = Training(WIDTH_4B, LLAMA_8B, 9961, 1152, 8192, "bf16-mixed", on_states=True, shared_optimizer=True)
ONE = Layout()


# ---- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
def test_one_rank_holds_what_megatrons_model_has(arch: Architecture, megatron: None) -> None:
    from tests.support.reference import tiny_model

    assert parameters_on_rank(arch, ONE, 0) == sum(p.numel() for p in tiny_model(arch).parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_hold_the_model(tied: bool) -> None:
    """Matrices are cut, norms are on every tensor-parallel rank, a tied table is on the first and the last stage."""
    arch = LLAMA_8B.replace(share_embeddings_and_output_weights=tied)
    layout = Layout(tp=8, pp=4)
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    held = 8 * sum(parameters_on_rank(arch, layout, stage) for stage in range(4))
    second_table = arch.vocab_size * arch.hidden_size if tied else 0
    assert held == arch.parameters() + 7 * norms + second_table


def kept_bytes(arch: Architecture, batch: int, length: int) -> int:
    """What autograd keeps of a forward pass of Megatron's model, each storage once, parameters left out."""
    from tests.support.reference import tiny_model

    model = tiny_model(arch).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(arch.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens, positions, None)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "arch",
    [
        LLAMA.replace(hidden_size=96, ffn_hidden_size=160, kv_channels=16),
        LLAMA.replace(hidden_size=64, ffn_hidden_size=256, num_query_groups=8, kv_channels=8),
    ],
    ids=["grouped", "wide"],
)
def test_a_layer_keeps_what_autograd_says(arch: Architecture, megatron: None) -> None:
    """One layer more, so many bytes more: of the layers as they run here."""
    more, less = (kept_bytes(arch.replace(num_layers=n), batch=2, length=48) for n in (4, 3))
    assert (more - less) / (2 * 48 * 4) == pytest.approx(kept_values(arch, ONE), rel=0.05)


def test_weights_gradients_and_optimizer_are_18_bytes_a_parameter_in_mixed_precision() -> None:
    """Megatron-core's docs, "distributed optimizer": 18 bytes, or 6 + 12 / dp where the states are shared out."""
    one = training_memory(Training(LLAMA_8B, None, 1, 8, 8192, "bf16-mixed"), ONE)
    held = sum(one.parts[name] for name in ("weights", "gradients", "optimizer"))
    assert held == 18 * LLAMA_8B.parameters()
    shared = Training(LLAMA_8B, None, 1, 8, 8192, "bf16-mixed", shared_optimizer=True)
    parts = training_memory(shared, Layout(dp=4)).parts
    assert sum(parts[n] for n in ("weights", "gradients", "optimizer")) == 9 * LLAMA_8B.parameters()


def test_what_makes_memory_smaller() -> None:
    at = Layout(tp=8, pp=4, dp=8, sequence_parallel=True, micro_batch=2)
    whole = training_memory(PAPER, at)
    for change in ({"recompute": "full"}, {"micro_batch": 1}):
        assert training_memory(PAPER, Layout(**{**vars(at), **change})).total < whole.total
    for change in ({"sequence_parallel": False}, {"tp": 4, "dp": 16}):
        assert training_memory(PAPER, Layout(**{**vars(at), **change})).total > whole.total
    # The teacher's states of a rank's 144 sequences, a 1/8 of each, wait on the last stage.
    waiting = whole.parts["waiting_states"]
    assert waiting in (0, 144 * 8192 * 4096 * 2 / 8)


# ---- FLOPs and time --------------------------------------------------------------------------------------------


def test_a_step_s_flops_are_those_that_torch_counts() -> None:
    """A student's forward and backward pass and a teacher's forward pass of transformers' models."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(arch: Architecture) -> Any:
        config = LlamaConfig(
            num_hidden_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_hidden_size,
            num_attention_heads=arch.num_attention_heads,
            num_key_value_heads=arch.num_query_groups,
            head_dim=arch.kv_channels,
            vocab_size=arch.vocab_size,
            attn_implementation="eager",
        )
        return LlamaForCausalLM(config)

    teacher, student = LLAMA, LLAMA.replace(hidden_size=24, ffn_hidden_size=40)
    t = Training(student, teacher, 1, 3, 32)
    tokens = torch.randint(teacher.vocab_size, (3, 32))
    models = model(student), model(teacher)
    with FlopCounterMode(display=False) as counter:
        models[0](tokens).logits.sum().backward()
        with torch.no_grad():
            models[1](tokens)
    counted = counter.get_total_flops()
    # What goes into the first layer's products needs no gradient of its own: the embedding is a table.
    assert counted == pytest.approx(step_flops(t), rel=0.01)


def test_the_paper_s_run() -> None:
    """94B tokens; products of 12.5 and 19.3 GFLOP a token forward (docs/performance.md) at 40 % of 256 x 989 TFLOP/s
    are 14.7 hours, and no layout is faster than its products."""
    assert pytest.approx(94e9, rel=1e-3) == PAPER.tokens
    cluster = Cluster(gpu("h100"), nodes=32, per_node=8)
    best = options(PAPER, cluster)[0]
    hours = best.step_s * PAPER.steps / 3600
    assert 94e9 * (3 * 12.5e9 + 19.3e9) / (256 * 0.4 * 989e12) / 3600 <= hours < 30
    assert best.memory.total <= 79 * GIB


# ---- layouts ---------------------------------------------------------------------------------------------------


def test_layouts_that_fit_come_fastest_first_and_can_be_made() -> None:
    cluster = Cluster(gpu("h100"), nodes=4, per_node=8)
    found = options(PAPER, cluster)
    assert [o.step_s for o in found] == sorted(o.step_s for o in found)
    assert len({o.layout for o in found}) == len(found)
    for option in found:
        x = option.layout
        assert x.ranks == 32
        assert x.tp <= 8
        assert (32 % x.pp, 1152 % (x.micro_batch * x.dp), 8 % x.tp) == (0, 0, 0)
        assert option.memory.total <= 79 * GIB
    # All others were too large.
    assert len(found) < len(list(layouts(PAPER, cluster)))
    smaller = options(PAPER, Cluster(gpu("h100", memory_gib=60), nodes=4, per_node=8))
    assert {o.layout for o in smaller} < {o.layout for o in found}


def test_more_devices_are_not_slower() -> None:
    seconds = [options(PAPER, Cluster(gpu("h100"), n, 8))[0].step_s for n in (4, 8, 16, 32)]
    assert seconds == sorted(seconds, reverse=True)


def test_where_nothing_fits_the_smallest_need_is_named() -> None:
    with pytest.raises(InputError) as told:
        options(PAPER, Cluster(gpu("l4"), 1, 1))
    said = str(told.value)
    assert "needs at least" in said
    assert "on each of 1 devices (" in said
    assert "recompute_granularity=full, micro_batch_size=1" in said
    assert "l4 has 20.2" in said
    need = float(said.partition("at least ")[2].partition(" GiB")[0])
    # With as much there is just one, that layout.
    enough = options(PAPER, Cluster(gpu("l4", memory_gib=(need + 0.1) / (1 - machines.RESERVE)), 1, 1))
    assert enough[0].memory.total / GIB == pytest.approx(need, abs=0.06)
    with pytest.raises(InputError, match=r"7 devices cannot share 1152 sequences a step and 32 layers"):
        options(PAPER, Cluster(gpu("h100"), 1, 7))


def test_every_gpu_has_its_numbers() -> None:
    found = [cluster_of(PlanConfig(gpu=name)) for name in GPUS]
    assert all(c.device.peak["bf16-mixed"] > c.device.peak["32"] > 0 for c in found)
    assert {c.per_node for c in found} == {8}
    own = cluster_of(PlanConfig(gpu="l4", memory_gib=10, tflops=50, nodes=2, gpus_per_node=3)).device
    assert (own.peak["32"], own.memory) == (50e12, pytest.approx(9.2 * GIB))
    here = cluster_of(PlanConfig(gpu=HERE))
    assert (here.devices, here.device.memory > GIB) == (1, True)
    for wrong in ({"nodes": 2}, {"tflops": 1.0}, {"gpus_per_node": 4}):
        with pytest.raises(InputError, match="plan.gpu=here: is one process"):
            cluster_of(PlanConfig(gpu=HERE, **wrong))


# ---- what recipes compute --------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "run_dir": "r",
    "data": {"seq_length": 128},
    "eval": {"samples": 4},
    "trainer": {"micro_batch_size": 2},
}
DISTILL = {"max_steps": 10, "global_batch_size": 8, "val_check_interval": 5, "limit_val_batches": 2}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Sizes alone: a config.json in a directory."""
    place = tmp_path / "sizes"
    place.mkdir()
    config = json.loads((ROOT / "assets" / "demo-teacher" / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


def test_sizes_come_from_a_config_or_a_checkpoint(model: str) -> None:
    whole, demo = sizes_of(model), sizes_of(ROOT / "assets" / "demo-teacher")
    assert whole == demo == sizes_of(f"{model}/config.json")
    assert sizes_of(ROOT / "assets" / "llama-3.1-8b").architecture.parameters() == LLAMA_8B.parameters()
    with pytest.raises(InputError, match="source=/nowhere: no such directory"):
        sizes_of("/nowhere")


def test_the_work_of_a_distillation(model: str) -> None:
    work = work_of("distill", {**SETTINGS, "student": model, "teacher": model, "distill": DISTILL}, Models())
    assert work.training is not None
    assert work.tokens == 10 * 8 * 128
    # Two validations of two batches of 8; the student's loss before and after, the teacher's once: of 4 sequences each.
    assert [p.tokens for p in work.passes] == [(2 * 16 + 2 * 4) * 128, (2 * 16 + 4) * 128]
    alone = {**DISTILL, "loss": "cross_entropy"}
    without = work_of("correct_teacher", {**SETTINGS, "teacher": model, "distill": alone}, Models())
    assert without.training is not None
    assert without.training.teacher is None
    assert [p.tokens for p in without.passes] == [(2 * 16 + 2 * 4) * 128]


def test_the_work_of_others(model: str) -> None:
    sizes = {"hidden_size": "3/4", "calibration_samples": 6}
    work = work_of("prune", {**SETTINGS, "source": model, "prune": sizes}, Models())
    assert work.model is not None
    assert work.model.hidden_size == 144
    assert [p.tokens for p in work.passes] == [(6 + 4) * 128, 4 * 128]
    layers = {"num_layers": 6, "layer_metric": "lm_loss", "calibration_samples": 6}
    scored = work_of("prune", {**SETTINGS, "source": model, "prune": layers}, Models())
    assert scored.passes[0].tokens == (6 * (1 + 8 // 2) + 4) * 128
    pairs = work_of("preference", {**SETTINGS, "student": model, "align": {"max_steps": 3}}, Models())
    assert pairs.tokens == 3 * 8 * 2 * 128
    budget = {"budget": {"parameters": "1/2"}, "slack": 0.3, "grid": {"hidden_size": ["3/4", "1/2"]}}
    asked = {**SETTINGS, "source": model, "search": budget}
    tried = work_of("search", {**asked, "distill": DISTILL}, Models())
    assert tried.model is not None
    assert 0.35 < tried.model.parameters() / 3_640_000 <= 0.52
    with pytest.raises(InputError, match="distill.max_steps: has no value; a plan needs a number"):
        work_of("search", {**asked, "distill": {"global_batch_size": 8}}, Models())
    assert work_of("export", {**SETTINGS}, Models()).passes == []


def test_the_work_of_a_model_that_no_memory_holds(model: str) -> None:
    asked = {**SETTINGS, "source": model, "stream": True, "prune": {"hidden_size": "3/4"}}
    assert work_of("prune", asked, Models()).stream
    chance = {**asked, "prune": {"hidden_size": "3/4", "importance": "random"}}
    assert work_of("prune", chance, Models()).passes == []


def test_a_streamed_pass_holds_a_layer_and_what_stands_beside_it() -> None:
    """By hand, of Llama-3.1-8B in bfloat16; a run of it took 4.6 GiB with NeMo's imports (docs/full_size.md)."""
    assert not LLAMA_8B.share_embeddings_and_output_weights
    parts = streamed_memory([LLAMA_8B], Layout(), 512, "bf16-mixed").parts
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert parts["weights"] == 2 * (layer + 2 * 128256 * 4096 + 4096)
    assert parts["fetched"] == 4 * layer
    assert 3.5 < sum(parts.values()) / 2**30 < 4.6


def test_a_model_that_is_not_there_is_asked_for() -> None:
    for named in (None, "<student>"):
        with pytest.raises(
            InputError, match="student: name a checkpoint, or a directory with its config.json"
        ):
            work_of("distill", {**SETTINGS, "student": named, "distill": DISTILL}, Models())
    known = Models({"m": sizes_of(ROOT / "assets" / "demo-teacher")})
    with pytest.raises(InputError, match="align.max_steps=null"):
        work_of("sft", {**SETTINGS, "student": "m", "align": {"max_steps": None}}, known)


def test_recipes_have_their_work() -> None:
    """Whatever may be a step is described, or said to compute nothing that is counted."""
    from nemo_minitron.run.registry import RECIPES
    from nemo_minitron.workflows.plan_run import work

    told = set(itertools.chain(work._KINDS, work._UNKNOWN))
    assert set(RECIPES) - told == {"instruct_data", "pipeline", "plan_run"}
