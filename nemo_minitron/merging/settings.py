"""What a merge is told: its models, its method, and numbers that may differ by model, by layer and by tensor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_minitron.checkpoints.weight_files import EMBEDDING
from nemo_minitron.errors import InputError
from nemo_minitron.merging.methods import METHODS, Mask, Values

GRADIENT, STEPS, PATH = "gradient", "steps", "path"
LAYERS = "model.layers."


@dataclass(frozen=True)
class Place:
    """A tensor of the model: its name, and its layer of how many; None before the first layer and after the last."""

    name: str
    layer: int | None
    layers: int

    @property
    def share(self) -> float:
        """How far it is from the first layer to the last, in 0 .. 1; what is outside the layers is at 0, the final norm
        and the head too, as in mergekit (plan.py@0.1.4, `plan_module`)."""
        if self.layer is None:
            return 0.0
        return self.layer / (self.layers - 1) if self.layers > 1 else 1.0

    @property
    def nearest(self) -> int:
        """Its layer; of an embedding the first, of what comes after the layers the last."""
        if self.layer is not None:
            return self.layer
        return 0 if self.name == EMBEDDING else self.layers - 1


def place_of(name: str, layers: int) -> Place:
    """Where a tensor of a Hugging Face model stands."""
    number = name.removeprefix(LAYERS).partition(".")[0] if name.startswith(LAYERS) else None
    return Place(name, None if number is None else int(number), layers)


@dataclass(frozen=True)
class Setting:
    """A number that depends on the tensor.

    Attributes:
        rules: (part of a tensor's name or None, values): the first rule that fits says it. One value is for all layers;
            several are spread over the layers.
        spread: "gradient": on straight lines between neighbouring values, as mergekit does it; "steps": each value is
            for as many neighbouring layers as the others, as in arXiv 2403.13187.
    """

    rules: tuple[tuple[str | None, tuple[float, ...]], ...]
    spread: str = GRADIENT

    def at(self, place: Place) -> float | None:
        """The number for a tensor; None where no rule fits."""
        for part, values in self.rules:
            if part is None or part == "*" or part in place.name:
                return self._spread(values, place)
        return None

    def _spread(self, values: Sequence[float], place: Place) -> float:
        if self.spread == STEPS:
            return values[place.nearest * len(values) // place.layers]
        scaled = place.share * (len(values) - 1)
        before = int(scaled)
        after = min(len(values) - 1, before + 1)
        return (1 - (scaled - before)) * values[before] + (scaled - before) * values[after]

    def plain(self) -> Any:
        """As mergekit's YAML has it."""
        shown = [(part, values[0] if len(values) == 1 else list(values)) for part, values in self.rules]
        if len(shown) == 1 and shown[0][0] is None:
            return shown[0][1]
        return [
            {"value": value} if part is None else {"filter": part, "value": value} for part, value in shown
        ]


def number(*values: float, spread: str = GRADIENT) -> Setting:
    """A setting for all tensors."""
    return Setting(((None, values),), spread)


_HALF = number(0.5)


@dataclass(frozen=True)
class Merge:
    """A merge, whatever it was told by.

    Attributes:
        method: one of `methods.METHODS`.
        models: as the user names them, the base left out where the method starts from it.
        base: None where the method needs none.
        weights, densities: one a model.
        t: of slerp.
        normalize, rescale: None: as the method does it.
        scale, filter_wise: see `methods.Values`.
        dtype: "source" or a word of `export.huggingface.DTYPES`.
        tokenizer: the model whose tokenizer the result has; None: the base, or the first.
        seed: of DARE's masks.
        layers: that the models are to have; None: any.
        path: of method "path", see `path.read_path`.
    """

    method: str
    models: tuple[str, ...]
    base: str | None
    weights: tuple[Setting, ...]
    densities: tuple[Setting, ...]
    t: Setting = _HALF
    normalize: bool | None = None
    rescale: str | None = None
    scale: float = 1.0
    filter_wise: bool = False
    dtype: str = "source"
    tokenizer: str | None = None
    seed: int = 1234
    layers: int | None = None
    path: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """All models, the base first."""
        return self.models if self.base is None else (self.base, *self.models)

    def with_models(self, models: Sequence[str], base: str | None) -> "Merge":
        """The same of other paths."""
        return replace(self, models=tuple(models), base=base)

    def values(self, place: Place, mask: Mask | None = None) -> Values:
        """What the method takes for a tensor.

        Raises:
            InputError: nothing is said of the tensor, or something that is not legal.
        """
        uses = METHODS[self.method].uses
        weights, densities = (
            tuple(self._one(name, number, setting, place) for number, setting in enumerate(settings))
            if name in uses
            else ()
            for name, settings in (("weight", self.weights), ("density", self.densities))
        )
        method = METHODS[self.method]
        found = Values(
            weights or (1.0,) * len(self.models),
            densities or (1.0,) * len(self.models),
            self._one("t", None, self.t, place) if "t" in uses else 0.5,
            method.normalize if self.normalize is None else self.normalize,
            self.scale,
            method.rescale if self.rescale is None else self.rescale,
            self.filter_wise,
            mask,
        )
        if self.method == "linear" and found.normalize and abs(math.fsum(found.weights)) < 1e-8:
            raise InputError(
                f"merge.weight: the weights of {place.name} sum to 0, and linear divides by their sum; change them or "
                "say merge.normalize=false"
            )
        return found

    def _one(self, name: str, model: int | None, setting: Setting, place: Place) -> float:
        of = "" if model is None else f" of {self.models[model]}"
        value = setting.at(place)
        if value is None:
            raise InputError(f"merge.{name}{of}: no value for {place.name}; give one without a filter")
        if not math.isfinite(value):
            raise InputError(f"merge.{name}{of}: {value} for {place.name}: must be a finite number")
        if name != "weight" and not 0 <= value <= 1:
            raise InputError(
                f"merge.{name}{of}: {value:g} for {place.name}: must be at least 0 and at most 1"
            )
        return value

    def plain(self) -> dict[str, Any]:
        """As mergekit's YAML says it; what mergekit has no word for has this project's."""
        if self.method == PATH:
            named = [{"model": model} for model in self.models]
            return {"merge_method": PATH, "models": named, "parameters": {"path": self.path}}
        uses = METHODS[self.method].uses
        models: list[dict[str, Any]] = []
        for number, model in enumerate(self.models):
            own = {
                name: settings[number].plain()
                for name, settings in (("weight", self.weights), ("density", self.densities))
                if name in uses
            }
            models.append({"model": model, **({"parameters": own} if own else {})})
        whole = dict(self._whole(uses))
        return {
            "merge_method": self.method,
            **({} if self.base is None else {"base_model": self.base}),
            "models": models,
            **({"parameters": whole} if whole else {}),
            **({} if self.dtype == "source" else {"dtype": self.dtype}),
            **({} if self.tokenizer is None else {"tokenizer_source": self.tokenizer}),
        }

    def _whole(self, uses: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        method = METHODS[self.method]
        if "t" in uses:
            yield "t", self.t.plain()
        if "weight" in uses:
            yield "normalize", method.normalize if self.normalize is None else self.normalize
        if "density" in uses:
            yield "rescale", method.rescale if self.rescale is None else self.rescale
        if self.scale != 1:
            yield "lambda", self.scale
        if self.filter_wise:
            yield "filter_wise", True
        if self.method == "dare_ties":
            yield "seed", self.seed
        spread = {setting.spread for setting in (*self.weights, *self.densities, self.t)}
        if STEPS in spread:
            yield "spread", STEPS


def check_models(merge: Merge) -> None:
    """Whether the method has the models that it needs.

    Raises:
        InputError: no base, or too few or too many models.
    """
    if merge.method == PATH:
        _check_path(merge)
        return
    method, count = METHODS[merge.method], len(merge.models)
    if method.base and merge.base is None:
        raise InputError(f"base=null: merge.method={merge.method} starts from a base model; say base=DIR")
    if not method.base and merge.base is not None:
        raise InputError(f"base={merge.base}: merge.method={merge.method} has no base; leave it out")
    beside = " beside the base" if method.base else ""
    if count < method.least or (method.most is not None and count > method.most):
        legal = f"{method.least}" if method.most == method.least else f"at least {method.least}"
        raise InputError(f"models: {count}{beside}: merge.method={merge.method} takes {legal}{beside}")
    for name, settings in (("weight", merge.weights), ("density", merge.densities)):
        if len(settings) != count:
            raise InputError(
                f"merge.{name}: {len(settings)} values for {count} models{beside}; give one number for all, or one a "
                "model"
            )


def _check_path(merge: Merge) -> None:
    if merge.path is None:
        raise InputError(
            "merge.path=null: merge.method=path needs the way through the layers, as 0:0-7,1:4-7"
        )
    if merge.base is not None:
        raise InputError(f"base={merge.base}: merge.method=path has no base; leave it out")
    if not merge.models:
        raise InputError("models: 0: merge.method=path takes at least 1")
