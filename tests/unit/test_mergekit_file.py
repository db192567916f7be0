"""mergekit's files: what is read of them, what is refused, and what a card says is read back."""

from pathlib import Path

import pytest
import yaml

from nemo_minitron.errors import InputError
from nemo_minitron.merging import mergekit_file
from nemo_minitron.merging.methods import METHODS
from nemo_minitron.merging.settings import Merge, check_models, number, place_of
from tests.support.merge_models import simple

TIES = """
models:
  - model: A
    parameters:
      weight: [0.2, 0.8]
      density: 0.5
  - model: B
    parameters:
      weight:
        - filter: mlp
          value: [0.1, 0.3, 0.5]
        - value: 0.7
  - model: C
merge_method: ties
base_model: C
parameters: {density: 0.25, normalize: false, int8_mask: true, lambda: 0.5}
dtype: float32
"""
SLERP = """
slices:
  - sources:
      - {model: B, layer_range: [0, 3]}
      - {model: A, layer_range: [0, 3]}
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 1]
    - value: 0.25
"""


def read(tmp_path: Path, text: str) -> Merge:
    file = tmp_path / "merge.yml"
    file.write_text(text)
    return mergekit_file.read(str(file), seed=9)


def test_a_file_of_mergekit_is_read(tmp_path: Path) -> None:
    merge = read(tmp_path, TIES)
    assert (merge.models, merge.base, merge.method, merge.dtype) == (("A", "B"), "C", "ties", "float32")
    assert (merge.normalize, merge.rescale, merge.scale, merge.tokenizer) == (False, None, 0.5, "C")
    found = merge.values(place_of("model.layers.1.mlp.up_proj.weight", 3))
    assert found.weights == pytest.approx((0.5, 0.3))
    assert found.densities == (0.5, 0.25)
    assert merge.values(place_of("model.norm.weight", 3)).weights == pytest.approx((0.2, 0.7))
    check_models(merge)


def test_slerp_goes_from_the_base(tmp_path: Path) -> None:
    merge = read(tmp_path, SLERP)
    assert (merge.models, merge.base, merge.layers) == (("A", "B"), None, 3)
    assert merge.values(place_of("model.layers.1.self_attn.q_proj.weight", 3)).t == 0.5
    assert merge.values(place_of("model.layers.1.mlp.up_proj.weight", 3)).t == 0.25


def test_dare_of_a_file_keeps_magnitudes_as_mergekit_does(tmp_path: Path) -> None:
    text = "models: [{model: A, parameters: {weight: 1}}]\nbase_model: C\nmerge_method: dare_ties\n"
    assert read(tmp_path, text).values(place_of("lm_head.weight", 3)).rescale == "l1"
    assert read(tmp_path, text + "parameters: {rescale: false}").rescale == "none"


@pytest.mark.parametrize("method", METHODS)
def test_what_a_card_says_is_read_back(method: str, tmp_path: Path) -> None:
    """Every tensor has the same numbers."""
    merge = simple(
        method,
        weights=(number(0.5, 0.75, spread="steps"), number(0.25)),
        t=number(0.25, 0.5, spread="steps"),
        scale=0.5,
        dtype="bfloat16",
        seed=77,
    )
    back = read(tmp_path, yaml.safe_dump(merge.plain() | ({"base_model": "A"} if method == "slerp" else {})))
    assert (back.models, back.base, back.dtype) == (merge.models, merge.base, merge.dtype)
    assert back.seed == (77 if method == "dare_ties" else 9)
    for layer in range(3):
        place = place_of(f"model.layers.{layer}.mlp.up_proj.weight", 3)
        assert back.values(place) == merge.values(place)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", ["cannot be read"]),
        ("[]", ["must be values by name"]),
        ("merge_method: passthrough\nmodels: [{model: A}]", ["merge_method: passthrough", "slerp"]),
        ("merge_method: linear", ["either models or slices"]),
        (TIES + "tokenizer_source: union", ["tokenizer_source: union", "one tokenizer"]),
        (TIES + "allow_crimes: true", ["allow_crimes", "not supported", "merge_method"]),
        (TIES.replace("dtype: float32", "dtype: float64"), ["dtype: float64", "bfloat16"]),
        (TIES.replace("lambda: 0.5", "epsilon: 0.5"), ["parameters.epsilon", "lambda"]),
        (TIES.replace("weight: [0.2, 0.8]", "weight: half"), ["parameters.weight: half", "must be a number"]),
        (TIES.replace("weight: [0.2, 0.8]", ""), ["parameters.weight: is missing", "ties"]),
        (TIES.replace("normalize: false", "normalize: 1"), ["parameters.normalize: 1", "true or false"]),
        (SLERP.replace("[0, 3]}", "[1, 3]}"), ["layer_range", "[1, 3]", "[0, layers of the models]"]),
        (SLERP.replace("base_model: A", "base_model: D"), ["base_model: D", "among its models"]),
        (SLERP.replace("base_model: A\n", ""), ["base_model", "slerp goes from it"]),
        (SLERP.replace("slices:\n", "slices:\n  - {sources: []}\n"), ["slices", "one slice of all layers"]),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{k}: &{k} [{','.join(['*' + p] * 10)}]\n" for p, k in zip("abcde", "bcdef", strict=True)
            ),
            ["cannot be read", "aliases"],
        ),
    ],
)
def test_what_a_file_may_not_say(text: str, says: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1
    for part in ("merge.file=", *says):
        assert part in str(caught.value)
