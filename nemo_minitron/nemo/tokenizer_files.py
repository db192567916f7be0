"""The directory of a tokenizer that NeMo is given.

NeMo copies that directory, file by file, into the context of each checkpoint (DirOrStringArtifact, nemo_toolkit 2.4.1):
of a model's directory the weights too, and where it holds a directory (`.cache` after `huggingface-cli download`,
`original`) saving ends with an IsADirectoryError. Of a hub id nothing is copied, and the checkpoint has no tokenizer.
"""

import functools
from pathlib import Path

from nemo_minitron import scratch
from nemo_minitron.data.tokenizer import as_version_4, load_tokenizer
from nemo_minitron.export import generation

# NeMo calls the copy in a context as the directory is called.
_NAME = "tokenizer"
_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")


@functools.cache
def tokenizer_files(directory: str | Path, settings_of: Path | None = None) -> Path:
    """A directory with nothing but a tokenizer's files, in the form of this transformers, and generation settings.

    Args:
        directory: with a tokenizer in it, or a hub id.
        settings_of: a checkpoint's own tokenizer directory, whose generation settings stand in where `directory` has
            none.

    Returns:
        The directory itself if it is one, or a copy that lives as long as this process.
    """
    place = Path(directory)
    settings = generation.gathered(place) if place.is_dir() else {}
    if not settings and settings_of is not None:
        settings = generation.gathered(settings_of)
    if place.is_dir() and _alone(place) and generation.carried(place) == settings:
        return place
    copy = scratch.lasting("tokenizer") / _NAME
    load_tokenizer(directory).save_pretrained(str(copy))
    generation.write(settings, copy)
    return copy


def _alone(directory: Path) -> bool:
    """Whether a directory is as `load_tokenizer(...).save_pretrained` and `generation.write` leave it."""
    names = [file for file in directory.iterdir() if file.name != "config.json" and file.suffix in _SUFFIXES]
    return len(names) == len(list(directory.iterdir())) and as_version_4(directory) == directory
