"""Which programs open an exported model, where a head is not hidden_size / heads wide.

Judged from their sources, or run here: docs/export.md names files and versions.
"""

from nemo_minitron.arch import Architecture

# Families whose model there has queries as wide as the residual stream, or heads of hidden_size / heads.
_SQUARE = {
    "llama.cpp": ("qwen2", "nemotron"),
    "Ollama": ("qwen2", "nemotron"),
    "vLLM": ("qwen2",),
    "MLX": ("qwen2",),
}


def refusal(consumer: str, a: Architecture) -> str | None:
    """Why a program does not open a model, or None if it does.

    Args:
        consumer: "llama.cpp", "Ollama", "vLLM", "MLX", "TensorRT-LLM" or "transformers 5".
        a: with a `model_type`.
    """
    if consumer == "transformers 5":
        return _transformers_5(a)
    if a.model_type in _SQUARE.get(consumer, ()) and a.query_size != a.hidden_size:
        return (
            f"{consumer} opens a {a.model_type} model only where num_attention_heads x head_dim is hidden_size; here "
            f"it is {a.num_attention_heads} x {a.kv_channels}, and hidden_size is {a.hidden_size}"
        )
    return None


def _transformers_5(a: Architecture) -> str | None:
    """transformers/models/llama/configuration_llama.py@5.24.0, validate_architecture."""
    if a.model_type != "llama" or a.hidden_size % a.num_attention_heads == 0:
        return None
    return (
        f"transformers 5 refuses a Llama configuration whose hidden_size ({a.hidden_size}) is no multiple of "
        f"num_attention_heads ({a.num_attention_heads}), with head_dim too; transformers 4 opens it"
    )


def refusals(a: Architecture) -> list[str]:
    """One line for each program that does not open a model."""
    found = (refusal(name, a) for name in (*_SQUARE, "TensorRT-LLM", "transformers 5"))
    return [line for line in found if line is not None]
