"""How good a candidate is: a Megatron model that is filled with it, and measured under any layout."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.config.evolve import EvolveRecipe
from nemo_minitron.evaluation.lm_loss import lm_loss
from nemo_minitron.evaluation.multiple_choice import Task, accuracy_and_margin, choice_losses
from nemo_minitron.merging.megatron import fill
from nemo_minitron.merging.models import Tensors
from nemo_minitron.merging.path import Path, walking
from nemo_minitron.nemo.session import Session, packed
from nemo_minitron.workflows.evolve import by_benchmark
from nemo_minitron.workflows.evolve.check import Prepared


@dataclass(frozen=True)
class Losses:
    """What is measured of a model, less is better: `seen`, by which the search goes, and `held_out`."""

    seen: Callable[[], float]
    held_out: Callable[[], float]


class Fitness:
    """A model of one architecture that is filled again and again.

    Args:
        architecture: of what it is filled with.
    """

    def __init__(self, r: EvolveRecipe, prepared: Prepared, architecture: Architecture) -> None:
        self.r, self.prepared = r, prepared
        self.session = Session(
            prepared.source,
            r.trainer,
            seq_length=prepared.source.seq_length,
            architecture=architecture,
        )
        kinds = {"lm_loss": self._by_text, "task": self._by_task, "benchmark": self._by_benchmark}
        self.losses: Losses = kinds[r.evolve.fitness]()

    def fill(self, weights: Tensors) -> None:
        """Take a candidate's weights."""
        fill(self.session.chunks, weights)

    @contextlib.contextmanager
    def walking(self, path: Path, layers: tuple[int, ...]) -> Iterator[None]:
        """Within it, of a model that is filled with all layers of several models, the path is run.

        Args:
            layers: how many each model has.
        """
        first = [sum(layers[:model]) for model in range(len(layers))]
        with walking(self.session.chunks[0], path, first):
            yield

    def _by_text(self) -> Losses:
        data, d = self.prepared.data, self.r.data

        def loss(split: str, samples: int | None) -> Callable[[], float]:
            dataset: Any = packed(data, d, split)  # type: ignore[arg-type]
            count = min(samples or len(dataset), len(dataset))
            size = self.r.trainer.micro_batch_size
            return lambda: lm_loss(self.session.chunks, dataset, count, micro_batch_size=size).nats

        return Losses(loss("train", self.r.evolve.samples), loss("valid", self.r.eval.samples))

    def _by_task(self) -> Losses:
        seen, held_out = self.prepared.task, self.prepared.held_out
        assert seen is not None
        assert held_out is not None
        return Losses(lambda: self._wrong(seen), lambda: self._wrong(held_out))

    def _wrong(self, task: Task) -> float:
        losses = choice_losses(
            self.session.chunks,
            task,
            micro_batch_size=self.r.trainer.micro_batch_size,
            normalize=self.r.evolve.normalize,
        )
        return 1 - float(accuracy_and_margin(losses, task)[0][0])

    def _by_benchmark(self) -> Losses:
        benchmark = by_benchmark.read(self.r, self.prepared)

        def wrong(begin: int, end: int | None) -> float:
            return by_benchmark.wrong(self.r, self.prepared, benchmark, self.session, begin, end)

        first = self.r.evolve.samples
        return Losses(lambda: wrong(0, first), lambda: wrong(first, None))
