"""Merge methods against their formulas in float64; settings by layer; memory of a few tensors."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.merge import Method as MethodName
from nemo_minitron.errors import FailedRun, InputError
from nemo_minitron.export.tensors import Weights
from nemo_minitron.merging.methods import METHODS, Values, drawn
from nemo_minitron.merging.models import Checked, Merged, opened
from nemo_minitron.merging.settings import PATH, Merge, Place, Setting, check_models, number, place_of
from tests.support import merge_reference as reference
from tests.support.merge_models import simple
from tests.support.stacked_weights import of_family, saved, stacked

SHAPES = [(33,), (17, 29)]
WEIGHTS, DENSITIES = (0.7, 1.3, -0.4), (0.3, 0.55, 1.0)


def tensors(shape: tuple[int, ...], count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    base, shared = torch.randn(2, *shape, generator=generator)
    noise = torch.randn(count, *shape, generator=generator)
    return [base, *(base + 0.1 * (shared + one) for one in noise)]


def masks(shape: tuple[int, ...]) -> list[torch.Tensor]:
    made = drawn(5, "a")
    return [made(i, torch.Size(shape), density) for i, density in enumerate(DENSITIES)]


def expected(method: str, base: Any, models: list[Any], shape: tuple[int, ...]) -> Any:
    weights, densities = list(WEIGHTS), list(DENSITIES)
    ones = [
        mask.numpy() if d < 1 else np.ones(shape) for mask, d in zip(masks(shape), DENSITIES, strict=True)
    ]
    return {
        "linear": lambda: reference.linear(models, weights),
        "task_arithmetic": lambda: reference.task_arithmetic(base, models, weights),
        "slerp": lambda: reference.slerp(models[0], models[1], 0.3),
        "ties": lambda: reference.ties(base, models, weights, densities),
        "dare_ties": lambda: reference.dare_ties(base, models, weights, densities, ones, "l1"),
        "model_stock": lambda: reference.model_stock(base, models),
    }[method]()


def values(method: str, **more: Any) -> Values:
    m = METHODS[method]
    given: dict[str, Any] = {"normalize": m.normalize, "rescale": m.rescale, "mask": drawn(5, "a"), **more}
    return Values(WEIGHTS, DENSITIES, 0.3, **given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_formula(method: str, shape: tuple[int, ...]) -> None:
    base, *models = tensors(shape)
    given = models[:2] if method == "slerp" else models
    found = METHODS[method].merge(base, given, values(method))
    assert found.dtype == torch.float32
    doubles = [tensor.double().numpy() for tensor in (base, *given)]
    wanted = expected(method, doubles[0], doubles[1:], shape)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_variants_of_methods() -> None:
    base, *models = tensors((17, 29))
    doubles = [tensor.double().numpy() for tensor in models]
    b = base.double().numpy()
    kept = [
        mask.numpy() if d < 1 else np.ones((17, 29))
        for mask, d in zip(masks((17, 29)), DENSITIES, strict=True)
    ]
    pairs = {
        "linear": (
            values("linear", normalize=False),
            reference.linear(doubles, list(WEIGHTS), normalize=False),
        ),
        "dare_ties": (
            values("dare_ties", rescale="density"),
            reference.dare_ties(b, doubles, list(WEIGHTS), list(DENSITIES), kept, "density"),
        ),
        "model_stock": (
            values("model_stock", filter_wise=True),
            reference.model_stock(b, doubles, by_row=True),
        ),
        "task_arithmetic": (
            values("task_arithmetic", normalize=True, scale=0.5),
            b + 0.5 * sum(w * (m - b) for w, m in zip(WEIGHTS, doubles, strict=True)) / sum(WEIGHTS),
        ),
    }
    for method, (v, wanted) in pairs.items():
        found = METHODS[method].merge(base, models, v)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=3e-6, err_msg=method)


def test_special_cases() -> None:
    """Nothing to divide by: equal models, opposite ones, a density of 0, weights that cancel out."""
    base, one, *_ = tensors((17, 29))
    same = Values((1.0, 1.0), (0.5, 0.5), 0.3, mask=drawn(1, "a"))
    for method in ("model_stock", "ties", "task_arithmetic"):
        torch.testing.assert_close(METHODS[method].merge(base, [base, base], same), base)
    torch.testing.assert_close(METHODS["slerp"].merge(None, [one, one], same), one)
    torch.testing.assert_close(METHODS["slerp"].merge(None, [one, -one], same), 0.4 * one)
    opposite = METHODS["model_stock"].merge(base, [base + one, base - one], same)
    torch.testing.assert_close(opposite, base)
    nothing = Values((1.0, 1.0), (0.0, 0.0), rescale="density", mask=drawn(1, "a"))
    for method in ("ties", "dare_ties"):
        torch.testing.assert_close(METHODS[method].merge(base, [one, one], nothing), base)
    cancelled = METHODS["task_arithmetic"].merge(base, [one, one], Values((1.0, -1.0)))
    torch.testing.assert_close(cancelled, base)


def test_a_mask_is_drawn_by_its_tensor_alone() -> None:
    shape = torch.Size((40, 50))
    first = drawn(1, "a")(0, shape, 0.25)
    assert torch.equal(first, drawn(1, "a")(0, shape, 0.25))
    assert 0.2 < first.float().mean() < 0.3
    for other in (
        drawn(1, "a")(1, shape, 0.25),
        drawn(1, "b")(0, shape, 0.25),
        drawn(2, "a")(0, shape, 0.25),
    ):
        assert not torch.equal(first, other)


def test_the_schema_names_the_methods() -> None:
    (choice,) = MethodName.__metadata__
    assert choice.names == (*METHODS, PATH)


# ---- numbers by layer ----------------------------------------------------------------------------------------


def test_numbers_are_spread_over_the_layers() -> None:
    """By numpy's own interpolation, and by hand for steps."""
    places = [place_of(f"model.layers.{i}.mlp.up_proj.weight", 7) for i in range(7)]
    gradient = number(0.0, 1.0, 0.5)
    wanted = np.interp(np.linspace(0, 1, 7), [0, 0.5, 1], [0, 1, 0.5])
    assert [gradient.at(place) for place in places] == pytest.approx(list(wanted))
    steps = number(1.0, 2.0, 3.0, spread="steps")
    assert [steps.at(place) for place in places] == [1, 1, 1, 2, 2, 3, 3]
    before, after = Place("model.embed_tokens.weight", None, 7), Place("lm_head.weight", None, 7)
    assert [s.at(p) for s in (gradient, steps) for p in (before, after)] == [0.0, 0.0, 1.0, 3.0]
    assert gradient.at(place_of("model.layers.0.mlp.up_proj.weight", 1)) == 0.5


def test_the_first_rule_that_fits_counts() -> None:
    setting = Setting((("self_attn", (0.1,)), ("layers.1.", (0.2,)), (None, (0.3,))))
    names = (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    )
    assert [setting.at(place_of(name, 3)) for name in names] == [0.1, 0.2, 0.3]
    merge = simple("ties", weights=(Setting((("mlp", (1.0,)),)), number(1.0)))
    with pytest.raises(InputError, match="merge.weight of A: no value for model.norm.weight"):
        merge.values(place_of("model.norm.weight", 3))


def check_all(merge: Merge) -> None:
    check_models(merge)
    for layer in range(3):
        merge.values(place_of(f"model.layers.{layer}.mlp.up_proj.weight", 3))


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("ties", {"base": None}, ["base=null", "merge.method=ties", "base=DIR"]),
        ("linear", {"base": "C"}, ["base=C", "merge.method=linear has no base"]),
        ("slerp", {"models": ("A",)}, ["models: 1", "slerp takes 2"]),
        ("model_stock", {"models": ("A",)}, ["models: 1 beside the base", "at least 2"]),
        ("linear", {"weights": (number(1.0),) * 3}, ["merge.weight: 3 values for 2 models"]),
        ("ties", {"densities": (number(1.0),)}, ["merge.density: 1 values for 2 models beside the base"]),
        ("ties", {"densities": (number(0.5), number(0.5, 1.5))}, ["merge.density of B: 1.5", "at most 1"]),
        ("slerp", {"t": number(-0.1)}, ["merge.t: -0.1", "at least 0"]),
        ("linear", {"weights": (number(float("nan")),) * 2}, ["merge.weight of A: nan", "finite number"]),
        ("linear", {"weights": (number(1.0), number(-1.0))}, ["sum to 0", "merge.normalize=false"]),
    ],
)
def test_numbers_and_models_that_are_refused(method: str, more: dict[str, Any], says: list[str]) -> None:
    merge = simple(method, **more)
    with pytest.raises(InputError) as caught:
        check_all(merge)
    for part in says:
        assert part in str(caught.value)


# ---- models --------------------------------------------------------------------------------------------------


class Counted:
    """A reader that knows how many of the tensors that it gave are still there."""

    alive = most = 0

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def read(self, name: str) -> torch.Tensor:
        tensor = self.reader.read(name)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(tensor, Counted.gone)
        return tensor

    @classmethod
    def gone(cls) -> None:
        cls.alive -= 1


@pytest.mark.parametrize("name", ["llama", "gemma", "nemotron"])
def test_a_merge_of_nemo_checkpoints_a_tensor_at_a_time(name: str, tmp_path: Path) -> None:
    """The stacked, fused tensors of NeMo 2, averaged in numpy, are what the merge reads back; few tensors at a time."""
    arch = of_family(name)
    models = [stacked(arch, seed=seed) for seed in (1, 2, 3)]
    readers = [Weights(arch, saved(tmp_path / str(i), model)) for i, model in enumerate(models)]
    mean = {key: sum(m[key].double() for m in models).float() / 3 for key in models[0]}
    wanted = Weights(arch, saved(tmp_path / "mean", mean))
    merge = simple("linear", models=("A", "B", "C"), weights=(number(1.0),) * 3)
    Counted.alive = Counted.most = 0
    merged = Merged(arch, merge, None, [Counted(reader) for reader in readers])
    for tensor in merged.parts:
        found = merged.read(tensor)
        torch.testing.assert_close(found, wanted.read(tensor), rtol=1e-6, atol=1e-7)
        del found
        assert Counted.alive == 0
    assert Counted.most == 3


def test_what_the_dtype_does_not_hold_is_found() -> None:
    arch = of_family("llama")

    class Large:
        def read(self, name: str) -> torch.Tensor:
            return torch.full(merged.parts[name].shape, 6e4)

    merge = simple("linear", normalize=False, weights=(number(1.0), number(1.0)))
    merged = Merged(arch, merge, None, [Large(), Large()])
    assert merged.read("model.embed_tokens.weight").max() == 1.2e5
    with pytest.raises(FailedRun, match="embed_tokens.weight: .* not finite in float16"):
        list(Checked(merged, torch.float16).blocks("model.embed_tokens.weight"))


def test_a_tied_table_by_either_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.support.merge_models import model
    from tests.support.merge_models import saved as saved_model

    place = saved_model(model(tie_word_embeddings=True), tmp_path / "tied")
    file = place / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": table}, file, {"format": "pt"})
    assert torch.equal(opened(find_source(place), "models[0]").read("model.embed_tokens.weight"), table)
    both = {**tensors, "lm_head.weight": table, "model.embed_tokens.weight": table + 1}
    save_file(both, file, {"format": "pt"})
    with pytest.raises(
        InputError, match="models.0.: tie_word_embeddings is true, but lm_head.weight differs"
    ):
        opened(find_source(place), "models[0]")
