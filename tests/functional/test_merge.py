"""recipes/merge.py as a user types it: what transformers opens afterwards, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoints.source import contents, find_source
from nemo_minitron.export.distributed_reader import DistributedReader
from nemo_minitron.export.tensors import Weights
from tests.functional.conftest import Pruned
from tests.support import merge_models, merge_paths, merge_reference
from tests.support.commands import Commands


@pytest.fixture(scope="module")
def models(commands: Commands) -> list[Path]:
    """A base and two models near it."""
    return merge_models.family(commands.home / "merging")


def arguments(models: list[Path], *overrides: str, beside: list[Path] | None = None) -> list[str]:
    base, *others = models
    named = ",".join(map(str, beside or others))
    return [f"models=[{named}]", *([] if "base=null" in overrides else [f"base={base}"]), *overrides]


def test_what_is_written_is_the_formula(commands: Commands, models: list[Path]) -> None:
    """Two merges by the command line and one by a file: every tensor, the config, the tokenizer and the card."""
    home = commands.home / "merged"
    file = commands.home / "slerp.yml"
    sources = ", ".join(f"{{model: {place}, layer_range: [0, 3]}}" for place in models[1:])
    file.write_text(
        f"slices: [{{sources: [{sources}]}}]\n"
        f"merge_method: slerp\nbase_model: {models[1]}\nparameters: {{t: [0, 1]}}\ndtype: bfloat16\n"
    )
    cases = {
        "linear": arguments(
            models, "base=null", "merge=linear", "merge.weight=[1,3]", "merge.shard_size=100KB"
        ),
        "ties": arguments(models, "merge=ties", "merge.density=[0.3,[0.5,1.0]]", f"to={home}/elsewhere"),
        "slerp": [f"merge.file={file}"],
        "path": arguments(models, "base=null", "merge=path", "merge.path=0:0-2,1:1*0.5,0:1-2*-1.5"),
        "stored": arguments(models, "base=null", "merge=path", "merge.path=0:0-2,1:1*0,0:1"),
    }
    asked = [
        {"recipe": "merge", "overrides": [*given, f"run_dir={home}/{name}"], "env": {}}
        for name, given in cases.items()
    ]
    given = [f"source={home}/stored/checkpoint", "license=none", f"to={home}/out", f"run_dir={home}/export"]
    *answers, export = commands.ask([*asked, {"recipe": "export", "overrides": given, "env": {}}])
    assert export["code"] == 2
    assert "path.json" in export["err"].splitlines()[-1]
    for name, answer in zip(cases, answers, strict=True):
        assert answer["code"] == 0, (name, answer["err"])
        assert not answer["nemo"], name
        assert answer["out"].splitlines()[-2].startswith("merge: "), answer["out"]
    check_paths(home, models)
    base, one, two = map(merge_models.weights_of, models)
    linear = merge_models.weights_of(home / "linear" / "checkpoint")
    ties = merge_models.weights_of(home / "elsewhere")
    slerp = merge_models.weights_of(home / "slerp" / "checkpoint")
    assert linear.keys() == ties.keys() == slerp.keys() == base.keys()
    assert len(list((home / "linear" / "checkpoint").glob("*.safetensors"))) > 1
    for name in base:
        found = re.match(r"model\.layers\.(\d)", name)
        share = int(found[1]) / 2 if found else 0.0
        wanted = (one[name] + 3 * two[name]) / 4
        np.testing.assert_allclose(linear[name], wanted, rtol=0, atol=1e-6, err_msg=name)
        densities = [0.3, 0.5 + 0.5 * share]
        wanted = merge_reference.ties(base[name], [one[name], two[name]], [1.0, 1.0], densities)
        np.testing.assert_allclose(ties[name], wanted, rtol=0, atol=1e-6, err_msg=name)
        wanted = merge_reference.slerp(one[name], two[name], share)
        np.testing.assert_allclose(slerp[name], wanted, rtol=2**-8, atol=1e-6, err_msg=name)  # bfloat16
    check_directory(home / "linear", models)
    card = (home / "slerp" / "checkpoint" / "README.md").read_text()
    assert "merge_method: slerp" in card
    assert str(commands.home) not in card


def check_paths(home: Path, models: list[Path]) -> None:
    """Folded into the weights of a plain model; with a scale of 0 each layer once, which no recipe opens."""
    from transformers import AutoModelForCausalLM

    folded = AutoModelForCausalLM.from_pretrained(home / "path" / "checkpoint", attn_implementation="eager")
    two = [AutoModelForCausalLM.from_pretrained(p, attn_implementation="eager") for p in models[1:]]
    slots = [(0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.0), (1, 1, 0.5), (0, 1, -1.5), (0, 2, 1.0)]
    tokens = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = merge_paths.by_hand(two, slots, tokens)
        torch.testing.assert_close(folded(tokens).logits, wanted, rtol=1e-3, atol=1e-3)
    stored = home / "stored" / "checkpoint"
    assert json.loads((stored / "path.json").read_text()) == {"path": "0:0-2,0:3*0.0,0:1"}
    assert len({name.split(".")[2] for name in merge_models.weights_of(stored) if ".layers." in name}) == 4


def check_directory(run: Path, models: list[Path]) -> None:
    """transformers opens it with every weight and no other; the result says what it was made of."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = run / "checkpoint"
    model, found = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(found.values()), found
    before, after = (json.loads((p / "config.json").read_text()) for p in (models[0], place))
    for key in (*merge_models.SIZES, "rope_theta", "rms_norm_eps"):
        assert after[key] == before[key], key
    text = "def f(x): return 12"
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (models[0], place)]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    tokens = torch.tensor([tokenizers[1].encode(text)])
    one, two = (AutoModelForCausalLM.from_pretrained(p) for p in models[1:])
    with torch.no_grad():
        for parameter, other in zip(one.parameters(), two.parameters(), strict=True):
            parameter.copy_((parameter.double() + 3 * other.double()) / 4)
        torch.testing.assert_close(model(tokens).logits, one(tokens).logits, rtol=1e-4, atol=1e-5)
    result = json.loads((run / "result.json").read_text())
    assert result["models"] == [str(path) for path in models[1:]]
    assert result["merge"]["models"][1]["parameters"] == {"weight": 3.0}
    assert result["params"] == sum(p.numel() for p in model.parameters())
    card = (place / "README.md").read_text()
    assert "Merged of model0, model1 by linear" in card
    assert "merge_method: linear" in card


@pytest.mark.slow
def test_a_run_and_a_directory_to_nemo_2(commands: Commands, pruned: Pruned, tmp_path: Path) -> None:
    """A NeMo 2 checkpoint comes out as it went in; merged with a neighbour, as NeMo 2, it is their mean."""
    common = ["license=none", "merge=linear"]
    copy = commands.run("merge", f"models=[{pruned.run_dir}]", f"run_dir={tmp_path / 'copy'}", *common)
    place = Path(copy.result()["checkpoint"])
    source = find_source(pruned.run_dir)
    own = Weights(source.architecture, DistributedReader(source.path / "weights", contents(source)))
    written = merge_models.weights_of(place)
    near, generator = tmp_path / "near", torch.Generator().manual_seed(3)
    shutil.copytree(place, near)
    from safetensors.torch import load_file, save_file

    noisy = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(place / "model.safetensors").items()
    }
    save_file(noisy, near / "model.safetensors", {"format": "pt"})
    ended = commands.run(
        "merge", f"models=[{pruned.run_dir},{near}]", f"run_dir={tmp_path / 'mean'}", "format=nemo", *common
    )
    assert ended.result()["peak_rss_gib"] > 0
    merged = find_source(tmp_path / "mean")
    assert (merged.kind, merged.architecture) == ("nemo", source.architecture)
    found = Weights(merged.architecture, DistributedReader(merged.path / "weights", contents(merged)))
    for name in own.parts:
        np.testing.assert_array_equal(own.read(name).double().numpy(), written[name])
        torch.testing.assert_close(found.read(name), (own.read(name) + noisy[name]) / 2, rtol=1e-6, atol=1e-7)
    assert "merge_method: linear" in (merged.path / "README.md").read_text()
    assert [path.name for path in (tmp_path / "mean").glob(".*")] == [".lock"]


# ---- refused before anything is written ----------------------------------------------------------------------

Damage = Callable[[Path], None]


def with_tensor(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(place / "model.safetensors")
        change(tensors)
        save_file(tensors, place / "model.safetensors", {"format": "pt"})

    return damage


def with_config(**values: Any) -> Damage:
    def damage(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | values))

    return damage


def not_finite(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")


def missing(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def other_tokenizer(place: Path) -> None:
    text = (place / "tokenizer.json").read_text()
    whole = json.loads(text)
    vocabulary = whole["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (place / "tokenizer.json").write_text(json.dumps(whole))


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "NaN": (with_tensor(not_finite), ["up_proj.weight holds 1 of", "not finite"]),
    "missing": (with_tensor(missing), ["lack model.layers.1.mlp.up_proj.weight"]),
    "base of rope": (
        with_config(rope_theta=5e5),
        ["rotary_base is 500000.0", "it is 10000.0", "one architecture"],
    ),
    "tokenizer": (other_tokenizer, ["its tokenizer is another", "token 300"]),
}
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "no base": (["merge=ties", "base=null"], ["base=null", "merge.method=ties", "base=DIR"]),
    "method": (["merge.method=passthrough"], ["merge.method=passthrough", "slerp"]),
    "null": (["merge=ties", "merge.density=null"], ["merge.density=null", "finite number"]),
    "t": (["merge=slerp", "base=null", "merge.t=[0,2]"], ["merge.t: 2", "at most 1"]),
    "tokenizer": (["merge=ties", "merge.tokenizer=else"], ["merge.tokenizer=else", "one of the models"]),
    "file and models": (["merge.file=x.yml"], ["merge.file=x.yml", "leave models and base out"]),
    "no model": (["merge=ties", "models=[{0},nowhere]"], ["models[1]=nowhere", "no such directory"]),
    "source": (["source={0}"], ["merge has no use for source", "models"]),
    "shards": (["merge=ties", "merge.shard_size=5GiB"], ["merge.shard_size=5GiB", "GB"]),
    "inside": (["merge=ties", "to={0}/merged"], ["to=", "inside the source"]),
    "there": (["merge=ties", "to={0}", "overwrite=true"], ["to=", "inside the source"]),
}


def test_refused(commands: Commands, models: list[Path]) -> None:
    cases = {}
    for name, (damage, says) in DAMAGES.items():
        bad = commands.home / "bad-merge" / name.replace(" ", "-")
        shutil.copytree(models[2], bad)
        damage(bad)
        cases[name] = ([*arguments(models, "merge=ties", beside=[models[1], bad])], says)
    licensed = [commands.home / "bad-merge" / f"licensed{i}" for i in range(2)]
    for place, licence in zip(licensed, ("mit", "apache-2.0"), strict=True):
        shutil.copytree(models[1], place)
        (place / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    cases["licences"] = (
        arguments(models, "merge=ties", beside=licensed),
        ["license: the models differ", "mit", "apache-2.0", "license=NAME"],
    )
    for name, (given, says) in SETTINGS.items():
        told = [item.format(models[1]) for item in given]
        kept = [
            item
            for item in arguments(models)
            if item.partition("=")[0] not in {one.partition("=")[0] for one in told}
        ]
        cases[f"setting: {name}"] = ([*kept, *(one for one in told if one != "base=null")], says)
    place = f"run_dir={commands.home}/bad-merge-run"
    commands.refuse("merge", {name: ([*given, place], says) for name, (given, says) in cases.items()})
