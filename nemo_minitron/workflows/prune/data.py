"""What a pruning calibrates on, checked before a model is loaded."""

import logging
from typing import Any

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import ScoredRecipe
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.evaluation.multiple_choice import load_task
from nemo_minitron.workflows.preflight import check_vocabulary

logger = logging.getLogger("nemo_minitron")


def check_data(r: ScoredRecipe, source: Source, data: PreparedData, scores: Any) -> None:
    """Refuse another tokenizer's data, or too little of it."""
    check_vocabulary(source, data)
    available = data.indexed.sequences("train", r.data.seq_length)
    if r.data.tokens is not None and r.prune.calibration_samples > available:
        logger.warning(
            "data.tokens=%s: more than the data has without repeats; all of it is read", r.data.tokens
        )
        r.prune.calibration_samples = available
    if scores is None and r.prune.importance == "activation" and r.prune.calibration_samples > available:
        raise InputError(
            f"prune.calibration_samples={r.prune.calibration_samples}: the train split has only {available} "
            f"sequences of {r.data.seq_length} tokens"
        )


def load_questions(p: PruneConfig, source: Source, data: PreparedData) -> Any:
    """The task of `prune.task_file`, as tokens; None without one."""
    if p.task_file is None:
        return None
    with of_setting("prune.task_file"):
        return load_task(p.task_file, data.tokenizer, source.seq_length, beginning=data.indexed.beginning)
