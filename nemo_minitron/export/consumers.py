"""Which programs open an exported model, where a head is not hidden_size / heads wide.

Judged from their sources, or run here: docs/export.md names files and versions.
"""

from nemo_minitron.arch import Architecture

# llama.cpp's loaders of these have queries as wide as the residual stream (src/models/qwen2.cpp, nemotron.cpp).
_SQUARE_IN_LLAMA_CPP = ("qwen2", "nemotron")


def refusal(consumer: str, a: Architecture) -> str | None:
    """Why a program does not open a model, or None if it does.

    Args:
        a: with a `model_type`.
    """
    if consumer == "llama.cpp" and a.model_type in _SQUARE_IN_LLAMA_CPP and a.query_size != a.hidden_size:
        return (
            f"llama.cpp opens a {a.model_type} model only where num_attention_heads x head_dim is hidden_size; here it "
            f"is {a.num_attention_heads} x {a.kv_channels}, and hidden_size is {a.hidden_size}"
        )
    return None
