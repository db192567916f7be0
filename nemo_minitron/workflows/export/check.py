"""What can be refused before a checkpoint is exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.families import FAMILIES
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.export import GGUF_QUANTISED, ExportRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.export import consumers, gguf_quantiser, hub, huggingface
from nemo_minitron.export.card import licence_of
from nemo_minitron.export.gguf_tokenizer import Vocabulary, vocabulary_of
from nemo_minitron.export.licences import Licence
from nemo_minitron.export.lineage import Lineage, lineage
from nemo_minitron.export.target import bytes_of, check_target
from nemo_minitron.workflows.export import fp8
from nemo_minitron.workflows.one_process import OneProcess, check_one_process
from nemo_minitron.workflows.preflight import converted

# Where the export lies in a run directory if `to` does not say.
_NAMES = {"hf": "huggingface", "gguf": "gguf"}
GGUF = "gguf"
FP8 = "fp8"


@dataclass(frozen=True)
class Prepared(OneProcess):
    """The checkpoint in NeMo 2 form, what is written of it, and where; `vocabulary`: of a GGUF file; `lineage`,
    `licence`: of its card."""

    source: Any
    source_sha256: str
    model: huggingface.Model
    target: Path
    shard_bytes: int
    vocabulary: Vocabulary | None
    lineage: Lineage
    licence: Licence | None


def check(r: ExportRecipe) -> Prepared:
    """Refuse what cannot be written; a Hugging Face source is converted once.

    Raises:
        InputError: names the value.
    """
    check_one_process(r.trainer, "export", ", whatever layout the source had")
    shard_bytes = bytes_of("export.shard_size", r.export.shard_size)
    if r.export.dtype == FP8:
        fp8.check(r.format)
    check_packages(r)
    came_from = lineage(r.source)
    licence = check_licence(r, came_from)
    to = r.to or Path(r.run_dir) / _NAMES[r.format]
    source = find_source(r.source, data=r.data)
    arch = source.architecture
    check_family(r, arch)
    # The bytes of a value are known once the weights are open; the least are checked before a conversion.
    check_target(to, r.source, size=arch.parameters(), overwrite=r.overwrite)
    settings = huggingface.generation_settings(source.tokenizer, arch.vocab_size)
    vocabulary = None
    if r.format == GGUF:
        tokenizer = huggingface.load_tokenizer(source.tokenizer, arch.vocab_size)
        vocabulary = vocabulary_of(tokenizer, settings, arch.vocab_size, str(source.tokenizer))
    model, source, target, sha256 = _opened(r, source, to)
    return Prepared(source, sha256, model, target, shard_bytes, vocabulary, came_from, licence)


def measured(r: ExportRecipe) -> bool:
    """Whether llama.cpp runs what was written beside an F16 file: where rounding is coarse."""
    coarse = r.export.quantization not in ("F32", "F16", "BF16")
    return r.format == GGUF and coarse and r.export.perplexity_tokens > 1


def check_family(r: ExportRecipe, arch: Architecture) -> None:
    """Refuse a model that the format does not have.

    Raises:
        InputError: a GPT-style model; one that llama.cpp does not open.
    """
    if arch.model_type is None:
        raise InputError(f"source={r.source}: a plain GPTModel; format={r.format} has {', '.join(FAMILIES)}")
    if r.format == GGUF and (reason := consumers.refusal("llama.cpp", arch)) is not None:
        raise InputError(f"source={r.source}: format=gguf: {reason}")


def check_packages(r: ExportRecipe) -> None:
    """Refuse a type whose packages are not installed, or a file where a directory is written.

    Raises:
        InputError: names the value.
    """
    if r.format != GGUF:
        return
    gguf_quantiser.check_packages(r.export.quantization, GGUF_QUANTISED, measured(r))
    if r.to is not None and str(r.to).lower().endswith(".gguf"):
        raise InputError(f"to={r.to}: format=gguf writes a directory: the file, its Modelfile and its card")


def check_licence(r: ExportRecipe, came_from: Lineage) -> Licence | None:
    """The licence of what is exported.

    Raises:
        InputError: none is known; one that forbids derivatives; a name on the hub that it does not allow.
    """
    licence = licence_of(r.license, came_from)
    if r.publish is None:
        if r.push:
            raise InputError("push=true: needs publish=ORG/NAME")
        return licence
    hub.check_repository(r.publish, push=r.push)
    if licence is None or licence.name_begins is None:
        return licence
    begins = licence.name_begins
    if not r.publish.split("/")[1].lower().startswith(begins.lower().replace(" ", "-")):
        raise InputError(
            f"publish={r.publish}: by the {licence.title} the name of a model made of it begins with {begins}"
        )
    return licence


def _opened(r: ExportRecipe, source: Any, to: str | Path) -> tuple[huggingface.Model, Any, Path, str]:
    """The weights, after a conversion where the source needs one."""
    from nemo_minitron.nemo.huggingface import export_model  # imports NeMo, only for what needs a conversion

    sha256 = source.sha256()
    source = converted(source, r.data)
    # Which type a matrix of a GGUF file has is decided by the file's writer.
    plain = "source" if r.export.dtype == FP8 else r.export.dtype
    model = export_model(source, "float32" if r.format == GGUF else plain)
    size = (
        gguf_quantiser.estimate(model, r.export.quantization, measured(r))
        if r.format == GGUF
        else model.bytes
    )
    target = check_target(to, r.source, size=size, overwrite=r.overwrite)
    return model, source, target, sha256
