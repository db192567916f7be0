"""Scoring as a callback of a plain nemo.lightning Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from nemo_minitron.axes import WIDTH_AXES
from nemo_minitron.environment import rank
from nemo_minitron.importance.aggregation import Statistic
from nemo_minitron.importance.block_influence import BlockInfluenceCollector
from nemo_minitron.importance.collectors import ImportanceCollector
from nemo_minitron.importance.scores import Scores
from nemo_minitron.nemo import models


class ImportanceCallback(pl.Callback):
    """Scores every unit of a NeMo 2 GPT while `trainer.validate` runs over calibration data.

    Give that Trainer a `MegatronStrategy(ddp="pytorch", setup_optimizers=False)`: otherwise NeMo allocates gradient
    buffers for validation too (and `trainer.test`, which has none, finds no `test_step` in its GPTModel). Works under
    every layout; afterwards `scores` is the same on every rank, and rank 0 has written it. The validation loops of a
    fit are not scored.

    Source: nemo/lightning/megatron_parallel.py@2.4.1, `init_ddp`.

    Args:
        path: where the scores go (safetensors); None keeps them in memory only.
        axes: of `axes.WIDTH_AXES`.
        batch, sequence: aggregations, "mean", "l2" or "var" (arXiv 2407.14679 §2.2).
        include_final_norm: whether the last norm counts for `hidden_size`.
        block_lengths: also score layers, alone (1) and in blocks of these lengths, by block influence.
        source_sha256, data_sha256: identities to keep with the scores, so that a plan can refuse another model's.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        axes: tuple[str, ...] = WIDTH_AXES,
        batch: Statistic = "l2",
        sequence: Statistic = "mean",
        include_final_norm: bool = True,
        block_lengths: Sequence[int] = (),
        source_sha256: str = "",
        data_sha256: str = "",
    ) -> None:
        super().__init__()
        self.path, self.axes, self.batch, self.sequence = path, axes, batch, sequence
        self.include_final_norm, self.block_lengths = include_final_norm, tuple(block_lengths)
        self.source_sha256, self.data_sha256 = source_sha256, data_sha256
        self.scores: Scores | None = None
        self._collector: ImportanceCollector | None = None
        self._blocks: BlockInfluenceCollector | None = None

    def attach(self, chunks: list[Any]) -> None:
        """Put the hooks on this rank's Megatron GPTModels."""
        self._collector = ImportanceCollector(
            chunks, self.axes, self.batch, self.sequence, self.include_final_norm
        )
        self._collector.__enter__()
        if self.block_lengths:
            self._blocks = BlockInfluenceCollector(chunks, self.block_lengths)
            self._blocks.__enter__()

    def finish(self, config: Any) -> Scores:
        """Remove the hooks, reduce over all ranks, write.

        Args:
            config: the scored model's.

        Raises:
            InputError: NaN or infinity in the activations.
        """
        collector, self._collector = self._collector, None
        assert collector is not None, "attach first"
        collector.__exit__(None, None, None)
        tensors = collector.finish()
        blocks, self._blocks = self._blocks, None
        if blocks is not None:
            blocks.__exit__(None, None, None)
            tensors |= blocks.finish()
        self.scores = Scores(
            architecture=models.from_config(config),
            source_sha256=self.source_sha256,
            batch=self.batch,
            sequence=self.sequence,
            samples=collector.samples,
            tokens=collector.tokens,
            data_sha256=self.data_sha256,
            tensors=tensors,
        )
        if self.path is not None and rank() == 0:
            self.scores.save(self.path)
        return self.scores

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.attach(list(trainer.strategy.megatron_parallel))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.finish(pl_module.config)
