"""The weights of models, by Hugging Face's names, one tensor at a time, whatever form each lies in; and their merge."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import Source, contents
from nemo_minitron.checkpoints.tensor_files import TensorFiles, check_tied
from nemo_minitron.errors import FailedRun, InputError
from nemo_minitron.export.distributed_reader import DistributedReader
from nemo_minitron.export.tensors import Part, Weights, parts
from nemo_minitron.merging.methods import METHODS, drawn
from nemo_minitron.merging.settings import Merge, place_of


class Read(Protocol):
    """What gives a tensor by its Hugging Face name, in the dtype that it is stored in."""

    def read(self, name: str) -> Tensor:
        """The tensor."""


def opened(source: Source, where: str) -> Read:
    """A checkpoint's tensors.

    Args:
        source: of a family that Hugging Face has.
        where: what messages call it, such as "models[0]=DIR".

    Raises:
        InputError: a tensor is missing or has another shape, or a tied table is not one.
    """
    if source.kind == "nemo":
        weights = Weights(source.architecture, DistributedReader(source.path / "weights", contents(source)))
        weights.check()
        return weights
    files = TensorFiles(source.path, source.architecture, where)
    if source.architecture.share_embeddings_and_output_weights:
        check_tied(files.headers, where)
    return files


def check_finite(values: Tensor, name: str, where: str) -> None:
    """Whether a tensor's values are numbers.

    Raises:
        InputError: one is not finite.
    """
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise InputError(
            f"{where}: {name} holds {bad:,} of {values.numel():,} values that are not finite (NaN or infinite)"
        )


class Kept:
    """A model's tensors in memory, each from when it is first asked for: a search reads them again and again."""

    def __init__(self, reader: Read) -> None:
        self._reader, self._kept = reader, dict[str, Tensor]()

    def read(self, name: str) -> Tensor:
        """The tensor; not to be changed."""
        if name not in self._kept:
            self._kept[name] = self._reader.read(name).clone()
        return self._kept[name]


@dataclass(frozen=True)
class Merged:
    """The tensors of a merge, each made when it is asked for: in memory are one tensor of each model and the result.

    Attributes:
        architecture: of all models.
        merge: what to do.
        base: None where the method needs none.
        models: in the order of `merge.models`.
    """

    architecture: Architecture
    merge: Merge
    base: Read | None
    models: Sequence[Read]

    @cached_property
    def parts(self) -> dict[str, Part]:
        """All tensors by name."""
        return {part.name: part for part in parts(self.architecture)}

    def read(self, name: str) -> Tensor:
        """One tensor of the merged model, float32."""
        merge = self.merge
        values = merge.values(place_of(name, self.architecture.num_layers), drawn(merge.seed, name))
        base = None if self.base is None else self.base.read(name).float()
        return METHODS[merge.method].merge(base, [model.read(name).float() for model in self.models], values)

    def check(self) -> None:
        """Whether every tensor has its numbers.

        Raises:
            InputError: as `Merge.values`.
        """
        for name in self.parts:
            self.merge.values(place_of(name, self.architecture.num_layers))


class Tensors(Protocol):
    """A model's weights as Hugging Face tensors, one at a time."""

    @property
    def architecture(self) -> Architecture:
        """Of the model."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """All tensors by name."""

    def read(self, name: str) -> Tensor:
        """One of them, float32."""


@dataclass(frozen=True)
class Checked:
    """Tensors that are refused where the dtype that they will be written in does not hold them."""

    tensors: Tensors
    dtype: torch.dtype

    @property
    def architecture(self) -> Architecture:
        """Of the model."""
        return self.tensors.architecture

    @property
    def parts(self) -> Mapping[str, Part]:
        """All tensors by name."""
        return self.tensors.parts

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One of them as one block, float32.

        Raises:
            FailedRun: it is not finite.
        """
        found = self.tensors.read(name)
        if not torch.isfinite(found.to(self.dtype)).all():
            written = str(self.dtype).removeprefix("torch.")
            raise FailedRun(
                f"{name}: the merged tensor is not finite in {written}; choose another dtype or smaller weights"
            )
        yield found
