"""Which scores a pruning needs, made on an open session: units by activations, layers by the metric asked for."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from nemo_minitron.config.recipes import ScoredRecipe
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.importance.aggregation import Statistic
from nemo_minitron.importance.depth_metrics import lm_loss_scores, task_scores
from nemo_minitron.nemo.importance_callback import ImportanceCallback
from nemo_minitron.progress import progress_bar


def score(
    session: Any,
    r: ScoredRecipe,
    data: PreparedData,
    task: Any,
    *,
    gone: Sequence[int],
    choose_layers: bool,
    source_sha256: str,
) -> Any:
    """Score what the session's model has now, over the calibration samples; every rank makes this call.

    Block influence comes with the widths' passes, for single layers and for the block of as many as go; what needs
    passes of its own is made only where it decides.

    Args:
        task: of `load_task`, or None.
        gone: how many layers may go; 0 where none does.
        choose_layers: whether `prune.layer_metric` decides which layers go.
        source_sha256: identity of the model that is scored.

    Returns:
        `Scores`, the same on every rank.

    Raises:
        InputError: NaN or infinity in the activations or losses.
    """
    lengths = sorted({1, *filter(None, gone)}) if any(gone) else []
    callback = ImportanceCallback(
        batch=cast(Statistic, r.prune.batch_aggregation),
        sequence=cast(Statistic, r.prune.sequence_aggregation),
        include_final_norm=r.prune.include_final_norm,
        block_lengths=lengths,
        source_sha256=source_sha256,
        data_sha256=data.indexed.manifest_sha256,
    )
    callback.attach(session.chunks)
    session.lm_loss(data, r.data, "train", r.prune.calibration_samples, "scoring")
    scores = callback.finish(session.model.config)
    if not lengths or not choose_layers:
        return scores
    if not r.prune.contiguous:
        lengths = [1]
    elif 1 not in gone:
        lengths = lengths[1:]
    return dataclasses.replace(scores, tensors=scores.tensors | _by_removal(session, r, data, task, lengths))


def _by_removal(
    session: Any, r: ScoredRecipe, data: PreparedData, task: Any, lengths: Sequence[int]
) -> dict[str, Any]:
    micro_batch_size = session.layout.micro_batch_size
    if r.prune.layer_metric == "lm_loss":
        samples = r.prune.calibration_samples
        progress = progress_bar("scoring layers", samples)
        dataset = session.dataset(data, r.data, "train")
        return lm_loss_scores(
            session.chunks,
            dataset,
            samples,
            lengths,
            micro_batch_size=micro_batch_size,
            progress=progress,
        )
    if r.prune.layer_metric == "task":
        return task_scores(
            session.chunks,
            task,
            lengths,
            micro_batch_size=micro_batch_size,
            normalize=r.prune.task_normalize,
            progress=progress_bar("scoring layers", len(task.requests)),
        )
    return {}
