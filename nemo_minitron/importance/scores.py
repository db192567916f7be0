"""Importance scores as an artifact: global, free of any parallel layout, one safetensors file."""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import BY_NAME
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.files import check_regular, replacing
from nemo_minitron.importance.aggregation import STATISTICS

VERSION = 1
_KEY = "nemo_minitron.scores"
_LARGEST = 1 << 30  # bytes; a model of 405 billion weights has 30 million scores


@dataclass
class Scores:
    """What each unit and layer of one model is worth, and how that was found out.

    Attributes:
        architecture: of the scored model; every index below is a global, 0-based one in it.
        source_sha256: digest of the scored checkpoint.
        batch: statistic over samples: "mean", "l2" or "var" (`importance.aggregation`).
        sequence: statistic over a sample's tokens, likewise.
        samples: calibration sequences, over all data-parallel ranks.
        tokens: calibration tokens, likewise.
        data_sha256: digest of the calibration data.
        tensors: float32, on the CPU, global. Keys and shapes: a width axis's name, `Axis.score_shape` (its
            units by layer; "hidden_size" once for the network), "layers/<metric>" [num_layers],
            "blocks/<metric>/<n>" [num_layers - n + 1], whose entry i is the block of n layers that starts at
            layer i. In all of them a higher score means: more is lost without it.

    Raises:
        InputError: a tensor whose name or shape does not fit `architecture`.
    """

    architecture: Architecture
    source_sha256: str
    batch: str
    sequence: str
    samples: int
    tokens: int
    data_sha256: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if (expected := _shape(name, self.architecture)) != tuple(tensor.shape):
                raise InputError(f"scores of {name}: shape {list(tensor.shape)}, must be {list(expected)}")
        self.tensors = {n: t.to("cpu", torch.float32).contiguous() for n, t in self.tensors.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all; an existing one is replaced."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tensors"}
        values["architecture"] = self.architecture.to_dict()
        with replacing(Path(path)) as temporary:
            save_file(self.tensors, temporary, {_KEY: json.dumps({"version": VERSION, **values})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what `save` wrote.

        Raises:
            InputError: no such file, not a scores file, another version, a damaged one, or one with values that no
                scoring gives.
        """
        try:
            check_regular(path, _LARGEST)
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"{path}: no such scores file") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a scores file ({first_line(error)})") from None
        if metadata is None:
            raise InputError(f"{path}: a safetensors file, but not one with scores")
        found = _parse(metadata, path)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise InputError(f"{path}: scores of {name[:60]!r}: must be finite floating-point numbers")
        return cls(tensors=tensors, **found)

    def check_matches(self, architecture: Architecture, source_sha256: str) -> None:
        """Refuse to be used on any but the scored model.

        Raises:
            InputError: the architecture or the checkpoint's digest is another one.
        """
        ours, theirs = self.architecture.to_dict(), architecture.to_dict()
        for name in ours:
            if ours[name] != theirs[name]:
                raise InputError(
                    f"scores of another model: it has {name}={ours[name]!r}, the source {theirs[name]!r}"
                )
        if self.source_sha256 != source_sha256:
            raise InputError(
                "scores of another model: they belong to the checkpoint with digest "
                f"{self.source_sha256[:12]}, the source has {source_sha256[:12]}"
            )


def _parse(metadata: str, path: Any) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(Scores)} - {"tensors"}
    try:
        values = json.loads(metadata)
        version = values.pop("version")
        if version == VERSION and set(values) == names:
            _check_values(values)
            return {**values, "architecture": Architecture.from_dict(values["architecture"])}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged scores file ({error})") from None
    raise InputError(f"{path}: scores file of version {version!r}, this program reads version {VERSION}")


def _check_values(values: dict[str, Any]) -> None:
    """Refuse what a scoring does not write.

    Raises:
        ValueError: names the key and its value.
    """
    legal: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("batch", "sequence"), lambda v: v in STATISTICS),
        **dict.fromkeys(("samples", "tokens"), lambda v: type(v) is int and v > 0),
        **dict.fromkeys(("source_sha256", "data_sha256"), lambda v: isinstance(v, str)),
    }
    for key, holds in legal.items():
        if not holds(values[key]):
            raise ValueError(f"{key} {str(values[key])[:60]!r}")


def _shape(name: str, arch: Architecture) -> tuple[int, ...]:
    if name in BY_NAME:
        return BY_NAME[name].score_shape(arch)
    kind, _, rest = name.partition("/")
    length = rest.rpartition("/")[2]
    if kind == "layers" and rest:
        return (arch.num_layers,)
    if kind == "blocks" and length.isdecimal() and 1 <= int(length) <= arch.num_layers:
        return (arch.num_layers - int(length) + 1,)
    raise InputError(
        f"scores of {name!r}: must be one of {', '.join(BY_NAME)}, layers/METRIC or blocks/METRIC/LENGTH"
    )
