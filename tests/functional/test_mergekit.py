"""Every merge method beside mergekit's own on the same models, with packages of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.merging import mergekit_file
from nemo_minitron.merging.methods import METHODS
from nemo_minitron.merging.models import Merged, opened
from nemo_minitron.merging.settings import place_of
from tests.support import merge_models

PACKAGES = ("mergekit==0.1.4", "immutables==0.21", "pydantic==2.10.6", "pydantic-core==2.27.2")
TOLERANCE = 1e-6
# Merges every file NAME.yml of its directory to NAME/; the masks that DARE draws go to NAME/masks.pt.
SCRIPT = """
import sys, pathlib, torch, yaml
import mergekit.merge_methods.generalized_task_arithmetic as gta
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

drawn, where = {}, []
execute, bernoulli = gta.GTATask.execute, torch.bernoulli

def remembered(self, *given, **named):
    where[:] = [self.weight_info.name, 0]
    return execute(self, *given, **named)

def recorded(probabilities, *given, **named):
    mask = bernoulli(probabilities, *given, **named)
    drawn[f"{where[0]}/{where[1]}"] = mask
    where[1] += 1
    return mask

gta.GTATask.execute, torch.bernoulli = remembered, recorded
torch.manual_seed(3)
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.yml")):
    drawn.clear()
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    run_merge(config, str(file.with_suffix("")), MergeOptions(copy_tokenizer=False, lazy_unpickle=False))
    torch.save(dict(drawn), file.with_suffix("") / "masks.pt")
"""
FILES = {
    "linear": """
models:
  - {model: A, parameters: {weight: 0.3}}
  - {model: B, parameters: {weight: [0.2, 0.9, 0.4]}}
merge_method: linear
""",
    "linear_sum": """
models:
  - {model: A, parameters: {weight: 0.3}}
  - {model: B, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0.1}]}}
merge_method: linear
parameters: {normalize: false}
""",
    "task_arithmetic": """
models:
  - {model: A, parameters: {weight: 0.7}}
  - {model: B, parameters: {weight: -0.2}}
merge_method: task_arithmetic
base_model: C
parameters: {lambda: 0.8}
""",
    "slerp": """
slices:
  - sources:
      - {model: A, layer_range: [0, 3]}
      - {model: D, layer_range: [0, 3]}
merge_method: slerp
base_model: A
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {value: 0.4}
""",
    "ties": """
models:
  - {model: A, parameters: {weight: 0.7, density: [0.2, 0.7]}}
  - {model: B, parameters: {weight: 0.5}}
merge_method: ties
base_model: C
parameters: {density: 0.45, int8_mask: true}
""",
    "ties_sum": """
models:
  - {model: A, parameters: {weight: 0.7}}
  - {model: B, parameters: {weight: 0.5}}
merge_method: ties
base_model: C
parameters: {density: 0.45, normalize: false, rescale: true, lambda: 1.5}
""",
    "dare_ties": """
models:
  - {model: A, parameters: {weight: 0.7, density: 0.4}}
  - {model: B, parameters: {weight: [0.5, 0.1], density: 0.6}}
merge_method: dare_ties
base_model: C
""",
    "dare_ties_plain": """
models:
  - {model: A, parameters: {weight: 0.7, density: 0.4}}
  - {model: B, parameters: {weight: 0.6, density: 1}}
merge_method: dare_ties
base_model: C
parameters: {rescale: false, normalize: true}
""",
    "model_stock": "models: [{model: A}, {model: B}, {model: D}]\nmerge_method: model_stock\nbase_model: C\n",
    "model_stock_rows": (
        "models: [{model: A}, {model: B}]\nmerge_method: model_stock\nbase_model: C\nparameters: {filter_wise: true}\n"
    ),
}


@pytest.fixture(scope="module")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages that go before this environment's: mergekit, and the pydantic that it works with."""
    place = tmp_path_factory.mktemp("mergekit") / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", place]
    subprocess.run([*command, *PACKAGES], check=True, timeout=300)
    return place


@pytest.mark.slow
def test_every_method(mergekit: Path, tmp_path: Path) -> None:
    base, one, two = merge_models.family(tmp_path / "models")
    # Far from the others: slerp goes along the sphere.
    far = merge_models.saved(merge_models.model(seed=8), tmp_path / "models" / "far")
    paths = {"A": one, "B": two, "C": base, "D": far}
    for name, text in FILES.items():
        for letter, path in paths.items():
            text = text.replace(f"model: {letter}", f"model: {path}")
        (tmp_path / f"{name}.yml").write_text(text + "dtype: float32\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(mergekit), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in FILES:
        merged = merge_of(tmp_path / f"{name}.yml")
        theirs = merge_models.weights_of(tmp_path / name)
        masks = torch.load(tmp_path / name / "masks.pt", weights_only=True)
        assert theirs.keys() == merged.parts.keys()
        assert bool(masks) == name.startswith("dare")
        for tensor, expected in theirs.items():
            found = tensor_of(merged, tensor, masks).double()
            difference = float((found - torch.from_numpy(expected)).abs().max())
            assert difference <= TOLERANCE * max(1.0, float(abs(expected).max())), (name, tensor, difference)


def merge_of(file: Path) -> Merged:
    merge = mergekit_file.read(str(file), seed=1)
    readers = [opened(find_source(path), path) for path in merge.paths]
    base = readers[0] if merge.base is not None else None
    arch = find_source(merge.paths[0]).architecture
    return Merged(arch, merge, base, readers if base is None else readers[1:])


def tensor_of(merged: Merged, name: str, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the recipe makes it; DARE with the masks that mergekit drew."""
    if not masks:
        return merged.read(name)
    place = place_of(name, merged.architecture.num_layers)
    # A model of density 1 draws none.
    drawing = [n for n, setting in enumerate(merged.merge.densities) if (setting.at(place) or 0) < 1]
    values = merged.merge.values(place, lambda number, *_: masks[f"{name}/{drawing.index(number)}"])
    assert merged.base is not None
    given = [model.read(name) for model in merged.models]
    return METHODS["dare_ties"].merge(merged.base.read(name), given, values)
