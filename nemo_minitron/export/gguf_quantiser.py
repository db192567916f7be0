"""llama.cpp's own quantiser, which mixes types by tensor (Q4_K_M and the like), by its binding llama-cpp-python."""

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.errors import InputError, need_package
from nemo_minitron.export.gguf_model import name_of
from nemo_minitron.export.huggingface import Model

_BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 9}
# Installed with `pip install llama-cpp-python`, which compiles it; no extra has it.
_PACKAGE = "llama_cpp"


def check_packages(kind: str, quantised: Sequence[str], perplexity: bool) -> None:
    """Refuse a type whose packages are not installed.

    Args:
        kind: `export.quantization`.
        quantised: the types that llama.cpp itself makes.
        perplexity: whether llama.cpp is to run the file.

    Raises:
        InputError: names the package.
    """
    need_package("gguf", "format=gguf")
    if kind in quantised and importlib.util.find_spec(_PACKAGE) is None:
        raise InputError(
            f"export.quantization={kind}: llama.cpp's own quantiser makes it; needs the package llama-cpp-python "
            "(pip install llama-cpp-python, which compiles it)"
        )
    if perplexity:
        need_package("xllamacpp", "export.perplexity_tokens", instead="0 leaves the perplexity out")


def estimate(model: Model, kind: str, measured: bool) -> int:
    """Bytes on the disk while a type is written.

    Args:
        measured: whether an F16 file lies beside it for a while.
    """
    # Beside llama.cpp's own types lies the float32 file that it reads.
    bits = _BITS.get(kind, _BITS["F32"] + 8) + (_BITS["F16"] if measured else 0)
    return model.weights.architecture.parameters() * bits // 8


def base_of(kind: str) -> str:
    """The type of most matrices: Q4_K of Q4_K_M."""
    head, _, size = kind.rpartition("_")
    return head if size in ("S", "M", "L") else kind


def uneven(model: Model, kind: str) -> dict[str, int]:
    """Matrices whose rows llama.cpp's blocks for a type do not divide, with their length: it falls back for those."""
    import gguf

    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[base_of(kind)]][0]
    parts = model.weights.parts.values()
    return {name_of(model, p.name): p.shape[-1] for p in parts if len(p.shape) > 1 and p.shape[-1] % block}


def quantise(source: Path, target: Path, kind: str) -> None:
    """Let llama.cpp quantise a file, on one thread.

    Args:
        source: with float32 weights.
        kind: one of llama.cpp's names, such as "Q4_K_M".

    Raises:
        RuntimeError: it could not.
    """
    import gguf
    import llama_cpp  # type: ignore

    said: list[bytes] = []

    @llama_cpp.llama_log_callback
    def log(_: int, text: bytes, __: ctypes.c_void_p) -> None:
        said.append(text)

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    params.nthread = 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        last = b"".join(said[-3:]).decode(errors="replace")
        raise RuntimeError(f"llama.cpp could not make {kind} of it: {' '.join(last.split())[-200:]}")
