"""FP8 by ModelOpt's post-training quantisation, for TensorRT-LLM and vLLM on GPUs that have it.

ModelOpt calibrates transformers' model on real text and writes its unified checkpoint (nvidia-modelopt@0.47,
`torch.quantization.FP8_DEFAULT_CFG`, `torch.export.export_hf_checkpoint`). It needs CUDA.
"""

import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError

_SEQUENCES = 64
_INDEX = "model.safetensors.index.json"


def check(format: str) -> None:
    """Refuse FP8 where it cannot be made.

    Raises:
        InputError: another format, or no CUDA.
    """
    import torch

    if format != "hf":
        raise InputError(f"export.dtype=fp8: is of format=hf; format={format} has export.quantization")
    if not torch.cuda.is_available():
        raise InputError("export.dtype=fp8: ModelOpt's quantisation needs CUDA, which this machine has not")


def quantise(place: Path, length: int) -> dict[str, Any]:
    """Replace the weights of a written and verified Hugging Face directory by FP8 ones.

    Args:
        length: of a calibration sequence, in tokens.

    Returns:
        Fields of `result.json`.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_minitron.export import written  # imports transformers

    tokens = written.tokens_of(AutoTokenizer.from_pretrained(place), _SEQUENCES, length).cuda()
    model = AutoModelForCausalLM.from_pretrained(place, torch_dtype="auto").cuda().eval()

    def calibrate(model: Any) -> None:
        with torch.inference_mode():
            for sequence in tokens:
                model(sequence[None])

    model = mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop=calibrate)
    made = place.with_name(f"{place.name}.fp8")
    try:
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=made)
        for old in [*place.glob("*.safetensors"), place / _INDEX]:
            old.unlink(missing_ok=True)
        for new in made.iterdir():
            shutil.move(new, place / new.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return {
        "dtype": "fp8",
        "calibration_tokens": tokens.numel(),
        "weight_bytes": sum(file.stat().st_size for file in place.glob("*.safetensors")),
    }
