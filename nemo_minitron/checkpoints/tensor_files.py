"""The tensors of a Hugging Face directory, mapped from its files: what is read of them lies in the page cache, which
the kernel takes back, and not in the memory of the process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.weight_files import EMBEDDING, HEAD, Tensor, read_headers
from nemo_minitron.errors import InputError

_ROWS = 4096  # of two tensors that are compared at a time


class TensorFiles:
    """Reads tensors by name.

    Args:
        directory: with weights in safetensors files.
        architecture: of the model.
        where: what names the directory in messages.

    Raises:
        InputError: as `weight_files.read_headers`.
    """

    def __init__(self, directory: Path, architecture: Architecture, where: str) -> None:
        self.headers = read_headers(directory, where)
        # A tied table may be stored by either of its names.
        by_head = architecture.share_embeddings_and_output_weights and EMBEDDING not in self.headers
        self._stored = {EMBEDDING: HEAD} if by_head else {}

    def read(self, name: str) -> Any:
        """A tensor in its stored dtype, backed by the file; to be let go of before the next is read."""
        stored = self._stored.get(name, name)
        return mapped(self.headers[stored], stored)


def mapped(header: Tensor, name: str) -> Any:
    """A tensor as `TensorFiles.read` gives it.

    Args:
        header: says which file holds it.
        name: that it has there.
    """
    from safetensors import safe_open

    # A handle maps the whole file: one for each tensor keeps of it only what is read now.
    with safe_open(header.file, framework="pt") as opened:
        return opened.get_tensor(name)


def check_tied(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse files that hold a tied weight twice, with other values; transformers would drop one without a word.

    Args:
        tensors: the headers of a model with tied embeddings.

    Raises:
        InputError: the two differ.
    """
    if not {EMBEDDING, HEAD} <= tensors.keys():
        return
    one, two = mapped(tensors[EMBEDDING], EMBEDDING), mapped(tensors[HEAD], HEAD)
    for begin in range(0, len(one), _ROWS):
        rows = slice(begin, begin + _ROWS)
        if not bool((one[rows].float() == two[rows].float()).all()):
            raise InputError(
                f"{where}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set "
                "tie_word_embeddings to false in config.json if both are meant"
            )
