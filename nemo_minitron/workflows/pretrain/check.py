"""What `recipes/pretrain.py` refuses, and prepares, before a model is loaded."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.config.recipes import PretrainRecipe
from nemo_minitron.config.trainer import check_stages, check_tensor_ranks
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.preflight import say_repeats


def architecture(recipe: PretrainRecipe, vocab_size: int) -> Architecture:
    """The model's sizes, checked against the layout.

    Raises:
        InputError: sizes that the tensor- or pipeline-parallel size does not divide.
    """
    m, t = recipe.model, recipe.trainer
    arch = Architecture(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.kv_channels,
        vocab_size=vocab_size,
        share_embeddings_and_output_weights=m.share_embeddings_and_output_weights,
        rotary_base=m.rotary_base,
        model_type="llama",
    )
    shared = {f"model.{axis}": getattr(arch, axis) for axis in ("num_query_groups", "ffn_hidden_size")}
    check_tensor_ranks("trainer.tensor_model_parallel_size", t.tensor_model_parallel_size, shared)
    check_stages(t, arch.num_layers, "model.num_layers")
    return arch


@dataclass(frozen=True)
class Prepared:
    """The indexed corpus and the sizes of the model that will be trained on it."""

    data: PreparedData
    architecture: Architecture

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {"data": self.data.to_config()}


def check(recipe: PretrainRecipe) -> Prepared:
    """Prepare the data and check the sizes, before NeMo is imported.

    Raises:
        InputError: what `prepare_data` and `architecture` refuse; no training steps; an export from several ranks.
    """
    if recipe.trainer.max_steps < 1:
        raise InputError(f"trainer.max_steps={recipe.trainer.max_steps}: must be at least 1")
    if recipe.export_dir and recipe.trainer.ranks > 1:
        raise InputError(
            f"export_dir={recipe.export_dir}: is written by one process, not by {recipe.trainer.ranks}"
        )
    data = prepare_data(recipe.data, ready=(recipe.prepared or {}).get("data"))
    t = recipe.trainer
    drawn = t.max_steps * t.global_batch_size * recipe.data.seq_length
    say_repeats(recipe.data, data, drawn, prepared=bool(recipe.prepared))
    return Prepared(data, architecture(recipe, data.indexed.vocab_size))
