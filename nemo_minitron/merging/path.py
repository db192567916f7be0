"""Models of data-flow space (arXiv 2403.13187, section 3.2): layers of several models in sequence, repeats among them,
and a scale on the state that goes into each.

A path of n slots is a model of n layers. With pre-norm layers the scales fold into its weights. With O_k the state
behind slot k, s_k its scale and F_k what a sublayer adds, O_k = s_k O_(k-1) + F_k(norm(s_k O_(k-1))). Let
c_k = s_1 ... s_k and O_k = c_k V_k. A norm gives norm(c x) = sign(c) norm(x), up to its epsilon, so
V_k = V_(k-1) + F_k(sign(c_k) norm(V_(k-1))) / c_k: the layer without a scale, whose two matrices that write into the
state are divided by c_k, and whose norms are multiplied by the sign of c_k, as is the final norm by that of c_n. What
is not exact is the epsilon, which would have to be epsilon / c_k^2 in layer k, and a checkpoint has one for all. A
scale of 0 leaves nothing of the state and cannot be folded.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn import Module, ModuleList

from nemo_minitron.arch import Architecture
from nemo_minitron.config.ranges import brief
from nemo_minitron.errors import InputError
from nemo_minitron.export.tensors import Part, parts
from nemo_minitron.megatron_gpt import gpt_model, layers_of
from nemo_minitron.merging.models import Read

_PIECE = re.compile(r"(\d{1,3}):(\d{1,6})(?:-(\d{1,6}))?(?:\*([^,]{1,40}))?")
_MOST_SLOTS = 10_000
# The matrices that write into the residual state, and the norms that read it.
_WRITES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Slot:
    """One layer of a path: `layer` of model `model`, both from 0; `scale`: of the state that goes into it."""

    model: int
    layer: int
    scale: float = 1.0


Path = tuple[Slot, ...]


def read_path(text: str, layers: Sequence[int]) -> Path:
    """A path as a user writes it: `0:0-7,1:4-7,0:7*0.9`, model and layers, with the scale of the first of them.

    Args:
        layers: how many each model has.

    Raises:
        InputError: what cannot be read, or a layer that no model has.
    """
    slots: list[Slot] = []
    for piece in str(text).replace(" ", "").split(","):
        found = _PIECE.fullmatch(piece)
        if found is None:
            raise _refused(
                text, f"{brief(piece)}: must be MODEL:LAYER or MODEL:FIRST-LAST, perhaps with *SCALE"
            )
        model, first = int(found[1]), int(found[2])
        last = first if found[3] is None else int(found[3])
        if model >= len(layers):
            raise _refused(text, f"{piece}: model {model}: there are {len(layers)} models, counted from 0")
        if not first <= last < layers[model]:
            raise _refused(text, f"{piece}: model {model} has the layers 0 to {layers[model] - 1}")
        slots.append(Slot(model, first, _scale(text, piece, found[4])))
        slots += [Slot(model, layer) for layer in range(first + 1, last + 1)]
        if len(slots) > _MOST_SLOTS:
            raise _refused(text, f"at most {_MOST_SLOTS:,} layers")
    return tuple(slots)


def _scale(text: str, piece: str, said: str | None) -> float:
    try:
        scale = 1.0 if said is None else float(said)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise _refused(text, f"{brief(piece)}: the scale must be a finite number")
    return scale


def _refused(text: str, reason: str) -> InputError:
    return InputError(f"merge.path={brief(text)}: {reason}")


def text_of(path: Path) -> str:
    """What `read_path` reads; neighbouring layers of one model are joined."""
    pieces: list[tuple[Slot, int]] = []
    for slot in path:
        first, last = pieces[-1] if pieces else (None, 0)
        if first is not None and (slot.model, slot.layer, slot.scale) == (first.model, last + 1, 1.0):
            pieces[-1] = (first, slot.layer)
        else:
            pieces.append((slot, slot.layer))
    return ",".join(
        f"{slot.model}:{slot.layer}{f'-{last}' if last > slot.layer else ''}"
        f"{'' if slot.scale == 1 else f'*{slot.scale!r}'}"
        for slot, last in pieces
    )


def every_layer(layers: Sequence[int]) -> Path:
    """All layers of all models, one model after the other."""
    return tuple(Slot(model, layer) for model, count in enumerate(layers) for layer in range(count))


def folds(path: Path) -> bool:
    """Whether the scales of a path can be folded into weights."""
    return all(slot.scale != 0 for slot in path)


def distinct(laid: "Laid") -> tuple["Laid", Path]:
    """A model of each layer of a path once, as it is, and the path through that model."""
    once = list(dict.fromkeys((slot.model, slot.layer) for slot in laid.path))
    stored = Laid(tuple(Slot(*key) for key in once), laid.models, laid.of, folded=False)
    through = tuple(Slot(0, once.index((slot.model, slot.layer)), slot.scale) for slot in laid.path)
    return stored, through


@dataclass(frozen=True)
class Laid:
    """The tensors of a path as those of a model with a layer a slot.

    Attributes:
        path: its slots.
        models: by number; embeddings, final norm and output layer are the first's.
        of: the models' architecture; their numbers of layers may differ.
        folded: whether the scales are in the weights; else they are left out.
    """

    path: Path
    models: Sequence[Read]
    of: Architecture
    folded: bool = True

    @property
    def architecture(self) -> Architecture:
        """With a layer a slot."""
        return self.of.replace(num_layers=len(self.path))

    @cached_property
    def parts(self) -> dict[str, Part]:
        """All tensors by name."""
        return {part.name: part for part in parts(self.architecture)}

    def read(self, name: str) -> Tensor:
        """One tensor, float32."""
        part = self.parts[name]
        if part.layer is None:
            tensor = self.models[0].read(name).float()
            return self._turned(tensor, self._factors[-1]) if name == "model.norm.weight" else tensor
        slot, inside = self.path[part.layer], name.split(".", 3)[3]
        tensor = self.models[slot.model].read(f"model.layers.{slot.layer}.{inside}").float()
        factor = self._factors[part.layer]
        if inside in _WRITES:
            return tensor / factor
        return self._turned(tensor, factor) if inside in _NORMS else tensor

    @cached_property
    def _factors(self) -> list[float]:
        """c_k of each slot; 1 where nothing is folded."""
        product, found = 1.0, []
        for slot in self.path:
            product *= slot.scale if self.folded else 1.0
            found.append(product)
        return found

    def _turned(self, weight: Tensor, factor: float) -> Tensor:
        if factor > 0:
            return weight
        # Stored is the offset from one where gamma is zero-centred.
        return -2 - weight if self.of.layernorm_zero_centered_gamma else -weight


def share_layers(chunks: Sequence[Any], path: Path) -> int:
    """Let slots of one rank that are the same layer of the same model have the same parameters, in memory once.

    Args:
        chunks: this rank's GPTModels with a layer a slot.

    Returns:
        How many slots of this rank have another's parameters.
    """
    first: dict[tuple[int, int], Module] = {}
    shared = 0
    for chunk in chunks:
        for number, layer in layers_of(gpt_model(chunk).decoder):
            key = (path[number].model, path[number].layer)
            if key not in first:
                first[key] = layer
                continue
            shared += 1
            for name, parameter in first[key].named_parameters():
                inside, _, last = name.rpartition(".")
                setattr(layer.get_submodule(inside), last, parameter)
    return shared


def scale_inputs(chunks: Sequence[Any], path: Path) -> None:
    """Let the layers of this rank's GPTModels multiply the state that goes into them by their slot's scale."""
    for chunk in chunks:
        for number, layer in layers_of(gpt_model(chunk).decoder):
            if path[number].scale != 1:
                layer.register_forward_pre_hook(_scaling(path[number].scale), with_kwargs=True)


def _scaling(scale: float) -> Any:
    def hook(layer: Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given:
            return (given[0] * scale, *given[1:]), named
        return given, {**named, "hidden_states": named["hidden_states"] * scale}

    return hook


@contextmanager
def walking(chunk: Any, path: Path, first: Sequence[int]) -> Iterator[None]:
    """Within it, a GPTModel that holds the layers of several models one after another runs those of a path only.

    Args:
        chunk: a GPTModel of one pipeline stage.
        first: the number of each model's first layer in it.
    """
    decoder = gpt_model(chunk).decoder
    every = list(decoder.layers)
    held = decoder.layers
    steps = [_Step(every[first[slot.model] + slot.layer], slot.scale) for slot in path]
    decoder.layers = ModuleList(steps)
    try:
        yield
    finally:
        decoder.layers = held


class _Step(Module):
    """A layer that may stand in a path several times, each time with another scale."""

    def __init__(self, layer: Any, scale: float) -> None:
        super().__init__()
        self.layer, self.scale, self.layer_number = layer, scale, layer.layer_number

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        state = hidden_states if self.scale == 1 else hidden_states * self.scale
        return self.layer(state, *given, **named)
