"""The sizes of a model without its weights: from a config.json alone, or from the header of whatever holds it."""

from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints import families
from nemo_minitron.checkpoints.gguf import config as gguf_config
from nemo_minitron.checkpoints.gguf import is_gguf, reader
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.checkpoints.untrusted import read_json
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.files import user_path


@dataclass(frozen=True)
class Sizes:
    """`seq_length`: the longest context in tokens."""

    architecture: Architecture
    seq_length: int


def sizes_of(path: str | Path, key: str = "source", data: DataConfig | None = None) -> Sizes:
    """Read the sizes of a checkpoint of any kind that `find_source` takes, or of a config.json with no weights beside.

    Raises:
        InputError: as `find_source`, but for weights that are missing.
    """
    found, where = user_path(path), f"{key}={path}"
    file = found / "config.json" if found.is_dir() else found
    if is_gguf(found):
        values = gguf_config.config_json(reader.read_header(found, where), where)
    elif file.name.endswith(".json") and file.is_file():
        values = read_json(file, where)
    else:
        source = find_source(path, key, data)
        return Sizes(source.architecture, source.seq_length)
    return Sizes(families.architecture_of(values, where), families.context_of(values, where))
