"""What lies at a path that is no checkpoint of a kind that is read, and what to do about it: one line each."""

import re
from pathlib import Path

LEGAL = (
    "legal are a run directory, a NeMo 2 directory (weights/, context/), a Hugging Face directory (config.json, "
    "*.safetensors) and a GGUF file"
)
_NEMO_1 = (
    "a NeMo 1 checkpoint, which is not read; NeMo's scripts/checkpoint_converters/convert_*_nemo_to_hf.py make a "
    "Hugging Face checkpoint of it"
)
_NESTED = 3


def of_no_directory(path: Path) -> str:
    """What to say of a path that is no directory."""
    if path.suffix == ".nemo" and path.is_file():
        return _NEMO_1
    if path.is_file():
        return f"a file, no directory; {LEGAL}"
    if path.exists():
        return f"neither a file nor a directory; {LEGAL}"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        return (
            "no such directory; models are not downloaded here: if it is one of the Hugging Face hub, run "
            f"`huggingface-cli download {path} --local-dir DIR` and give DIR"
        )
    return "no such directory"


def of_directory(directory: Path) -> str:
    """What to say of a directory that holds no checkpoint."""
    names = {entry.name for entry in directory.iterdir()}
    ranks = [name for name in names if re.match(r"(tp|mp)_rank_\d+", name)]
    if "model_config.yaml" in names and (ranks or names & {"model_weights", "model_weights.ckpt"}):
        return _NEMO_1
    if {"metadata.json", "common.pt"} <= names:
        return f"the weights of a NeMo 2 checkpoint alone; give the directory above it, {directory.parent}"
    if "adapter_config.json" in names:
        return (
            "a PEFT adapter without its model; merge it (PeftModel.merge_and_unload) and give what that saves"
        )
    if "params.json" in names and any(name.startswith("consolidated.") for name in names):
        return "a checkpoint in the format of its makers (params.json, consolidated.*); take it in Hugging Face's"
    if nested := _nested(directory):
        return f"no checkpoint here, but in {', '.join(nested)}; {LEGAL}"
    return f"no checkpoint here; {LEGAL}"


def _nested(directory: Path) -> list[str]:
    """Checkpoints one or two levels below, such as the steps of a NeMo 2 run, as far as they are worth naming."""
    found = [
        str(entry.parent.relative_to(directory))
        for pattern in ("*/config.json", "*/context", "*/*/context", "*/checkpoints/*/context")
        for entry in sorted(directory.glob(pattern))
    ]
    return [*found[:_NESTED], *(["..."] if len(found) > _NESTED else [])]
