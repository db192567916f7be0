"""A Hugging Face directory read as if it were a distributed checkpoint: Megatron's fused tensors, made a layer at a
time. `export.tensors` says which rows of them each tensor is."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.tensor_files import TensorFiles
from nemo_minitron.export.tensors import Part, fused_rows, parts, split

_Layer = Mapping[str, Tensor]


class HuggingFaceReader:
    """Reads as `distributed_reader.DistributedReader` does; the layer after the one that is read is fetched meanwhile.

    Args:
        architecture: of the model.
        tensors: its files.
    """

    def __init__(self, architecture: Architecture, tensors: TensorFiles) -> None:
        self.architecture, self._tensors = architecture, tensors
        self._parts: dict[tuple[str, int | None], list[Part]] = {}
        for part in parts(architecture):
            self._parts.setdefault((part.key, part.layer), []).append(part)
        self._behind = ThreadPoolExecutor(1)
        self._coming: tuple[int, Future[_Layer]] | None = None
        self._layer: tuple[int, _Layer] | None = None

    def read(self, key: str, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A box of a tensor, in its stored dtype.

        Args:
            begin, size: by axis of the global tensor, of which the first is the layer's number, of a layer's tensor.
        """
        if (key, None) in self._parts:
            return _box(self._whole(key, None), begin, size)
        return _box(self._of_layer(begin[0])[key], begin[1:], size[1:])[None]

    def _of_layer(self, number: int) -> _Layer:
        if self._layer is None or self._layer[0] != number:
            coming, self._coming, self._layer = self._coming, None, None
            fetched = coming[1].result() if coming else {}
            self._layer = (number, fetched if coming and coming[0] == number else self._fetch(number))
            if number + 1 < self.architecture.num_layers:
                self._coming = (number + 1, self._behind.submit(self._fetch, number + 1))
        return self._layer[1]

    def _fetch(self, number: int) -> _Layer:
        """All of a layer's tensors, in memory."""
        return {key: self._whole(key, layer).clone() for key, layer in self._parts if layer == number}

    def _whole(self, key: str, layer: int | None) -> Tensor:
        found = self._parts[key, layer]
        if found[0].part == "all":
            return self._tensors.read(found[0].name)
        numbers = torch.arange(fused_rows(self.architecture, found[0]))
        fused = None
        for part in found:
            tensor = self._tensors.read(part.name)
            fused = tensor.new_empty(len(numbers), *tensor.shape[1:]) if fused is None else fused
            fused[split(self.architecture, part.part, numbers)] = tensor.to(fused.dtype)
        assert fused is not None
        return fused


def _box(tensor: Tensor, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    for axis, (first, length) in enumerate(zip(begin, size, strict=True)):
        tensor = tensor.narrow(axis, first, length)
    return tensor
