"""What can be refused before a checkpoint is exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.export import huggingface
from nemo_minitron.export.target import bytes_of, check_target
from nemo_minitron.export_config import ExportRecipe

# Where the export lies in a run directory if `to` does not say.
_NAMES = {"hf": "huggingface"}


@dataclass(frozen=True)
class Prepared:
    """The checkpoint in NeMo 2 form, what is written of it, and where."""

    source: Any
    source_sha256: str
    model: huggingface.Model
    target: Path
    shard_bytes: int

    def to_config(self) -> dict[str, Any]:
        """Nothing: there is one process."""
        return {}


def check(r: ExportRecipe) -> Prepared:
    """Refuse what cannot be written; a Hugging Face source is converted once.

    Raises:
        InputError: names the value.
    """
    from nemo_minitron.nemo.checkpoints import find_source
    from nemo_minitron.nemo.families import FAMILIES
    from nemo_minitron.nemo.huggingface import export_model
    from nemo_minitron.nemo.openings import converted

    if r.trainer.ranks > 1:
        raise InputError(
            f"{r.trainer.ranks} ranks: export works in one process, whatever layout the source had"
        )
    shard_bytes = bytes_of("export.shard_size", r.export.shard_size)
    to = r.to or Path(r.run_dir) / _NAMES[r.format]
    source = find_source(r.source, data=r.data)
    if source.architecture.model_type is None:
        raise InputError(f"source={r.source}: a plain GPTModel; format={r.format} has {', '.join(FAMILIES)}")
    # The bytes of a value are known once the weights are open; the least are checked before a conversion.
    check_target(to, r.source, size=2 * source.architecture.parameters(), overwrite=r.overwrite)
    huggingface.generation_settings(source.tokenizer, source.architecture.vocab_size)
    sha256 = source.sha256()
    source = converted(source, r.data)
    model = export_model(source, r.export.dtype)
    target = check_target(to, r.source, size=model.bytes, overwrite=r.overwrite)
    return Prepared(source, sha256, model, target, shard_bytes)
