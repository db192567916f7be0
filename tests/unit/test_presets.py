"""The presets for Llama-3.1-8B state the papers' 4B models: sizes and parameters, from the architecture alone."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_minitron.arch import Architecture
from nemo_minitron.config.recipes import DistillRecipe, PruneRecipe, parse
from nemo_minitron.distillation.intermediate import Intermediate
from nemo_minitron.pruning import explicit_layers, resolve_target
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.workflows.distill.settings import intermediate

CONF = Path(__file__).resolve().parents[2] / "conf"
LLAMA_31_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)
SIZES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers")


# arXiv 2408.11796, table 3: hidden, MLP, layers; billions of parameters, and of those without embeddings.
@pytest.mark.parametrize(
    ("preset", "sizes", "parameters", "non_embedding"),
    [
        ("llama31_8b/width", (3072, 9216, 32), 4.51, 3.72),
        ("llama31_8b/depth", (4096, 14336, 16), 4.54, 3.49),
    ],
)
def test_the_papers_4b_models(
    preset: str, sizes: tuple[int, int, int], parameters: float, non_embedding: float
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        prune = compose("prune", [f"+conf={preset}", "run_dir=x", "source=x"]).prune
    target = resolve_target(LLAMA_31_8B, {axis: prune[axis] for axis in SIZES})
    assert (target.hidden_size, target.ffn_hidden_size, target.num_layers) == sizes
    assert (target.num_attention_heads, target.num_query_groups, target.kv_channels) == (32, 8, 128)
    assert round(target.parameters() / 1e9, 2) == parameters
    assert round(target.non_embedding_parameters() / 1e9, 2) == non_embedding


def test_the_depth_preset_drops_the_papers_block() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        prune = compose("prune", ["+conf=llama31_8b/depth", "run_dir=x", "source=x"]).prune
    assert explicit_layers(32, None, list(prune.drop_layers)) == [*range(15), 31]


# arXiv 2408.11796, section 3: context 8192, batch 1152, 94B tokens, 32 nodes of 8 GPUs; distillation 1e-4 to 1e-5 over
# 40 steps of warm-up and on logits alone, correction 120 and a fifth of the peak of 3e-4.
@pytest.mark.parametrize(
    ("recipe", "preset", "peak", "warm_up"),
    [
        ("distill", "width", 1e-4, 40),
        ("distill", "depth", 1e-4, 40),
        ("correct_teacher", "correction", 6e-5, 120),
    ],
)
def test_the_papers_training(recipe: str, preset: str, peak: float, warm_up: int) -> None:
    register_resolvers(recipe)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose(recipe, [f"+conf=llama31_8b/{preset}", "run_dir=x", "teacher=x"])
    d, t = found.distill, found.trainer
    ranks = t.tensor_model_parallel_size * t.pipeline_model_parallel_size * t.data_parallel_size
    assert (t.num_nodes, ranks, t.precision) == (32, 32 * 8, "bf16-mixed")
    assert (found.data.seq_length, d.global_batch_size) == (8192, 1152)
    assert d.max_steps == -(-94_000_000_000 // (8192 * 1152))
    assert (d.optim.lr, d.optim.min_lr, d.optim.warmup_steps) == (peak, peak / 10, warm_up)
    assert d.loss == ("forward_kl" if recipe == "distill" else "cross_entropy")
    assert (d.intermediate.layers, d.intermediate.embedding, d.ce_weight) == (None, False, 0)


@pytest.mark.parametrize("preset", ["width", "depth"])
def test_pruning_takes_one_node(preset: str) -> None:
    register_resolvers("prune")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        t = compose("prune", [f"+conf=llama31_8b/{preset}", "run_dir=x", "source=x"]).trainer
    assert (t.num_nodes, t.data_parallel_size, t.tensor_model_parallel_size) == (1, 1, 8)


@pytest.mark.parametrize("preset", ["width", "depth"])
def test_a_streamed_pruning_takes_one_process(preset: str) -> None:
    register_resolvers("prune")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("prune", [f"+conf=llama31_8b/{preset}", "run_dir=x", "source=x", "stream=true"])
    assert parse(PruneRecipe, config).trainer.ranks == 1


# arXiv 2407.14679, tables 15 to 17: for fewer layers the embeddings and the third layer from the end, by cosine,
# weighed as the output's loss; for narrower ones the output alone.
@pytest.mark.parametrize(("preset", "layers"), [("width", {}), ("depth", {29: 13})])
def test_which_states_the_demo_presets_compare(preset: str, layers: dict[int, int]) -> None:
    register_resolvers("distill")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        recipe = parse(
            DistillRecipe, compose("distill", [f"+conf={preset}", "run_dir=x", "student=x", "teacher=x"])
        )
    student = LLAMA_31_8B.replace(num_layers=16)
    found = intermediate(recipe, student, LLAMA_31_8B)
    assert recipe.distill.loss == "forward_kl"
    assert (recipe.distill.temperature, recipe.distill.ce_weight) == (1.0, 0.0)
    if not layers:
        assert found is None
    else:
        assert found == Intermediate(layers, embedding=True, at="output", distance="cosine", alpha=None)
