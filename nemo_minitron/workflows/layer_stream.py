"""Samples that go through a model layer by layer: one layer's weights are in memory, the residual states on the disk.

Each layer ends with its figures and states on the disk, so that a run that was killed goes on at the layer it was in.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_minitron.evaluation.lm_loss import stacked
from nemo_minitron.files import remove, replacing, sync
from nemo_minitron.workflows.one_layer import OneLayer

_PROGRESS = "progress.safetensors"
_KEY = "nemo_minitron.layer_stream"
_CPU = torch.device("cpu")

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Samples of one kind. `name`: of their states' files; `dataset`: of GPTDataset's items, of which the first `count`
    are taken; `begin`: the layer at which they set out, from where another kind has come to."""

    name: str
    dataset: Any
    count: int
    begin: int = 0


def passes(kinds: Sequence[Samples], layers: int) -> int:
    """How many samples go through how many layers, as one number, until `layers` layers are done."""
    return sum(kind.count * max(0, layers - kind.begin) for kind in kinds)


# What is made of a layer: given its number, the GPTModel that is this layer now, and what sends all samples of a kind
# through it, it returns figures, which are added to those of the other layers.
Look = Callable[[int, Any, Callable[..., None]], Figures]


class LayerStream:
    """Sends samples through all layers.

    Args:
        one: the model.
        directory: for states and figures; whoever made it removes it.
        identity: all that decides the states and figures; what a run of another one left is removed.
        seq_length: tokens in a sample.
        micro_batch_size: samples in a forward pass.
        progress: told how many samples have gone through how many layers, as one number.
    """

    def __init__(
        self,
        one: OneLayer,
        directory: Path,
        identity: str,
        *,
        seq_length: int,
        micro_batch_size: int,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.one, self._directory, self._identity = one, directory, identity
        self._seq_length, self._micro_batch_size = seq_length, micro_batch_size
        self._progress, self._done = progress, 0
        self.kept = 0  # layers that an earlier run had finished
        self.seconds: list[float] = []  # of each layer since
        self.cpu_seconds: list[float] = []  # of all threads: other work on the machine hardly changes them
        # Not `config.params_dtype`, which NeMo sets to float32 for bf16-mixed.
        self._width, self._dtype = one.module.config.hidden_size, next(one.module.parameters()).dtype

    def facts(self) -> dict[str, Any]:
        """Fields of `result.json`: of how many layers an earlier run had been through, and what each took since."""
        return {
            "layers_kept": self.kept,
            "layer_s": [round(seconds, 2) for seconds in self.seconds],
            "layer_cpu_s": [round(seconds, 2) for seconds in self.cpu_seconds],
        }

    def run(self, kinds: Sequence[Samples], look: Look) -> Figures:
        """Send all samples through all layers.

        Args:
            kinds: of samples.
            look: at each layer; sends each kind through it once, by its name.

        Returns:
            The sums of what `look` found, by name.
        """
        begin, figures = self._begun(kinds)
        self.kept = begin
        self._done = passes(kinds, begin)
        for number in range(begin, self.one.layers):
            started, worked = time.monotonic(), time.process_time()
            with torch.no_grad(), self.one.as_layer(number) as model:
                found = look(number, model, self._sender(number, {kind.name: kind for kind in kinds}))
            figures = _added(figures, found)
            self._finish(number + 1, figures)
            self.seconds.append(time.monotonic() - started)
            self.cpu_seconds.append(time.process_time() - worked)
        return figures

    def _begun(self, kinds: Sequence[Samples]) -> tuple[int, Figures]:
        """Of how many layers the figures are there, and these."""
        try:
            with safe_open(self._directory / _PROGRESS, framework="pt") as file:
                said = json.loads((file.metadata() or {})[_KEY])
                if said["identity"] == self._identity and self._has_states(said["layers"], kinds):
                    return said["layers"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, LookupError, ValueError, TypeError):
            pass
        remove(self._directory)
        self._directory.mkdir(parents=True)
        return 0, {}

    def _has_states(self, layers: int, kinds: Sequence[Samples]) -> bool:
        """Whether all samples that are past a layer have their states before the next; after the last none are left."""
        if layers == self.one.layers:
            return True
        begun = [kind for kind in kinds if kind.begin < layers]
        return all(self._file(layers, kind).stat().st_size == self._bytes(kind) for kind in begun)

    def _finish(self, layers: int, figures: Figures) -> None:
        """From here on a run goes on after so many layers."""
        for file in self._directory.glob(f"{layers}-*.states"):
            sync(file)
        said = json.dumps({"identity": self._identity, "layers": layers})
        with replacing(self._directory / _PROGRESS) as temporary:
            save_file(figures, temporary, {_KEY: said})
        for file in self._directory.glob("*.states"):
            if not file.name.startswith(f"{layers}-"):
                file.unlink()

    def _sender(self, number: int, kinds: Mapping[str, Samples]) -> Callable[..., None]:
        def send(
            name: str,
            take: Callable[[dict[str, Tensor], Tensor], None] | None = None,
            past: str | None = None,
        ) -> None:
            """Through the layer; `take` is given each microbatch and its states after the final norm, [s, b, h].
            `past`: the kind whose states before the layer these have after it."""
            kind = kinds[name]
            before = self._states(number, kinds[past or name]) if number else None
            after = self._states(number + 1, kind) if number + 1 < self.one.layers else None
            for first in range(0, kind.count, self._micro_batch_size):
                rows = slice(first, min(first + self._micro_batch_size, kind.count))
                batch = stacked([kind.dataset[i] for i in range(rows.start, rows.stop)], _CPU)
                state = None if before is None else before[rows].transpose(0, 1).contiguous()
                state, normed = self.one.forward(batch, state, without=past is not None)
                if after is not None:
                    after[rows] = state.transpose(0, 1)
                if take is not None:
                    take(batch, normed)
                self._done += rows.stop - rows.start
                self._progress(self._done)

        return send

    def _states(self, number: int, kind: Samples) -> Tensor:
        """The residual states before a layer, [samples, s, h], backed by a file."""
        path, shape = self._file(number, kind), self._shape(kind)
        # A full disk is an error here; where a mapped page finds no room, it is a signal.
        with open(path, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, self._bytes(kind))
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=self._dtype).view(shape)

    def _file(self, number: int, kind: Samples) -> Path:
        return self._directory / f"{number}-{kind.name}.states"

    def _shape(self, kind: Samples) -> tuple[int, int, int]:
        return kind.count, self._seq_length, self._width

    def _bytes(self, kind: Samples) -> int:
        return math.prod(self._shape(kind)) * self._dtype.itemsize


def _added(one: Figures, other: Figures) -> Figures:
    return {name: one.get(name, 0) + tensor.double() for name, tensor in other.items()} | {
        name: tensor for name, tensor in one.items() if name not in other
    }
