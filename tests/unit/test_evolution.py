"""CMA-ES over the spaces of merges: numbers and paths out of vectors, what is remembered, what there is to go by."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.merging.evolution import WORST, Candidate, Memory, check_size, reference, search
from nemo_minitron.merging.path import Slot, read_path, text_of
from nemo_minitron.merging.report import Shown, write_report
from nemo_minitron.merging.settings import Merge, number, place_of
from nemo_minitron.merging.spaces import Layers, Parameters

TARGET = np.linspace(0.2, 0.8, 6)


def dare(method: str = "dare_ties") -> Merge:
    base = None if method in ("linear", "slerp") else "C"
    return Merge(method, ("A", "B"), base, (number(0.5),) * 2, (number(0.5),) * 2)


def test_numbers_of_a_merge() -> None:
    space = Parameters(dare(), groups=2, largest_weight=2.0)
    assert space.names == [
        *("weight 0.0", "weight 0.1", "weight 1.0", "weight 1.1"),
        *("density 0.0", "density 0.1", "density 1.0", "density 1.1"),
    ]
    assert space.start == [0.5] * 8
    merge = space.merge_of([i / 8 for i in range(8)])
    first = merge.values(place_of("model.layers.1.mlp.up_proj.weight", 4))
    last = merge.values(place_of("model.layers.2.mlp.up_proj.weight", 4))
    assert first.weights == pytest.approx((1e-6, 0.5))
    assert last.weights == pytest.approx((0.25, 0.75))
    assert (first.densities, last.densities) == ((0.5, 0.75), (0.625, 0.875))
    slerp = Parameters(dare("slerp"), groups=3)
    assert slerp.names == ["t 0", "t 1", "t 2"]
    assert slerp.merge_of([0.1, 0.2, 0.3]).values(place_of("lm_head.weight", 3)).t == pytest.approx(0.3)
    with pytest.raises(InputError, match="1 number to search for"):
        check_size(Parameters(dare("slerp")), "merge.method=slerp")
    with pytest.raises(InputError, match="0 number"):
        check_size(Parameters(dare("model_stock")), "merge.method=model_stock")


def test_paths_out_of_vectors() -> None:
    """The start is the first model; what is kept, and its scales, are where the names say."""
    for scales, count in (("none", 10), ("slots", 20), ("pairs", 35)):
        space = Layers((3, 2), repeats=2, scales=scales, reach=0.5)
        assert len(space.names) == len(space.start) == count
        assert space.path_of(space.start) == tuple(Slot(0, layer) for layer in range(3))
    space = Layers((3, 2), repeats=2, scales="pairs", reach=0.5)
    vector = dict.fromkeys(space.names, 0.5)
    vector |= {
        "keep 0:0": 0.9,
        "keep 1:1": 0.8,
        "keep 0:0#1": 0.7,
        "scale 0:0>1:1": 0.75,
        "scale 1:1>0:0": 0.0,
    }
    path = space.path_of(list(vector.values()))
    assert path == (Slot(0, 0), Slot(1, 1, 1.25), Slot(0, 0, 0.5))
    slots = Layers((3, 2), scales="slots", reach=0.2)
    vector = dict.fromkeys(slots.names, 0.4) | {"keep 1:0": 0.9, "scale 1:0": 1 / 3}
    path = slots.path_of(list(vector.values()))
    assert path == (Slot(1, 0, 0.933333),)
    assert read_path(text_of(path), [3, 2]) == path


class Bowl:
    """A loss with its least value at TARGET; counts how often it is asked, and may die."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked, self.dies_at = 0, dies_at

    def __call__(self, vectors: Sequence[Sequence[float]]) -> list[float]:
        if self.asked == self.dies_at:
            raise KeyboardInterrupt
        self.asked += len(vectors)
        assert all(0 <= x <= 1 for vector in vectors for x in vector)
        return [float(np.sum((np.asarray(vector) - TARGET) ** 2)) for vector in vectors]


class Six:
    names: ClassVar = [f"x{i}" for i in range(6)]
    start: ClassVar = [0.5] * 6


def searched(file: Path, bowl: Any, fingerprint: str = "a", **more: Any) -> tuple[Candidate, Memory]:
    memory = Memory(file, fingerprint, writes=True)
    given: dict[str, Any] = {"generations": 30, "population": None, "sigma": 1 / 6, "seed": 3, **more}
    return search("parameters", Six(), bowl, memory, **given), memory


def test_it_finds_the_bottom(tmp_path: Path) -> None:
    bowl = Bowl()
    best, memory = searched(tmp_path / "c.jsonl", bowl)
    assert bowl.asked == 30 * (4 + int(3 * math.log(6))) == len(memory.known)
    np.testing.assert_allclose(best.vector, TARGET, atol=0.02)
    assert best.loss == min(c.loss for c in memory.known.values())


def test_a_search_that_was_killed_goes_on(tmp_path: Path) -> None:
    """After a kill in the middle of a line: the same candidates, and no known one is measured again."""
    whole, memory = searched(tmp_path / "whole.jsonl", Bowl(), generations=8)
    file = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        searched(file, Bowl(dies_at=25), generations=8)
    assert len(file.read_text().splitlines()) == 26
    text = file.read_text()
    file.write_text(text[:-30])
    np.random.seed(7)  # whatever else the process draws
    bowl = Bowl()
    again, resumed = searched(file, bowl, generations=8)
    assert again == whole
    assert bowl.asked == 8 * 9 - 24
    assert resumed.known == memory.known
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == [
        json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()[1:]
    ]
    other = Bowl()
    searched(file, other, fingerprint="b", generations=8)
    assert other.asked == 72


def test_workers_measure_the_same_candidates(tmp_path: Path) -> None:
    one, memory = searched(tmp_path / "1.jsonl", Bowl(), generations=3)
    bowl = Bowl()
    several, other = searched(tmp_path / "4.jsonl", bowl, generations=3, workers=4)
    assert (several, other.known, bowl.asked) == (one, memory.known, 27)


def test_another_seed_asks_for_others(tmp_path: Path) -> None:
    one, _ = searched(tmp_path / "1.jsonl", Bowl(), generations=1)
    two, _ = searched(tmp_path / "2.jsonl", Bowl(), generations=1, seed=4)
    assert one.vector != two.vector


def test_a_loss_that_is_the_same_for_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        searched(tmp_path / "c.jsonl", lambda vectors: [0.25], generations=3)
    assert "all 9 candidates of the first generation have the loss 0.25" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_loss_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    losses = iter([math.nan, math.inf, *range(1, 8)])
    best, memory = searched(tmp_path / "c.jsonl", lambda vectors: [next(losses)], generations=1)
    assert best.loss == 1
    assert [c.loss for c in memory.known.values()][:2] == [WORST, WORST]


def test_references_are_remembered_by_name(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "c.jsonl", "a", writes=True)
    assert reference("mean", memory, lambda: 2.5) == 2.5
    again = Memory(tmp_path / "c.jsonl", "a", writes=True)
    assert reference("mean", again, lambda: 9.0) == 2.5
    silent = Memory(tmp_path / "other.jsonl", "a", writes=False)
    reference("mean", silent, lambda: 1.0)
    assert not (tmp_path / "other.jsonl").exists()


def test_the_report(tmp_path: Path) -> None:
    _, memory = searched(tmp_path / "c.jsonl", Bowl(), generations=3)
    reference("seen: A", memory, lambda: 2.0)
    rows = [Shown("A", 2.0, 2.1), Shown("evolved: parameters", 0.5, 0.6)]
    write_report(list(memory.known.values()), {"parameters": Six.names}, rows, "nats", tmp_path)
    lines = (tmp_path / "evolve.csv").read_text().splitlines()
    assert lines[0] == "stage,generation,candidate,loss,x0,x1,x2,x3,x4,x5"
    assert len(lines) == 1 + 27
    assert lines[1].startswith("parameters,0,0,")
    assert "| evolved: parameters | 0.5000 | 0.6000 |" in (tmp_path / "evolve.md").read_text()
    assert (tmp_path / "evolve.png").stat().st_size > 5000
