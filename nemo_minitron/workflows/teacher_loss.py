"""The teacher's own loss: one that lost its weights on the way teaches nothing."""

import logging
import math
from typing import Any

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.data.statistics import unigram_entropy_nats
from nemo_minitron.errors import InputError
from nemo_minitron.nemo.session import split_loss

logger = logging.getLogger("nemo_minitron")
# Nats. Random weights cost as much as a guess among all tokens, or more.
BETTER_THAN_A_GUESS = 0.1


def teacher_loss(
    chunks: list[Any],
    data: PreparedData,
    d: DataConfig,
    samples: int | None,
    *,
    micro_batch_size: int,
    where: str,
) -> float:
    """`checked` LM loss in nats of a loaded teacher over the first `samples` held-out sequences; every rank calls.

    Args:
        chunks: this rank's Megatron GPTModels.
        where: as of `checked`.

    Raises:
        InputError: it guesses.
    """
    loss = split_loss(chunks, data, d, "valid", samples, micro_batch_size=micro_batch_size, label="teacher")
    return checked(loss.nats, data, where)


def checked(loss: float, data: PreparedData, where: str) -> float:
    """A teacher's loss on held-out data, in nats a token, once it is known to be of use.

    Args:
        where: how a refusal begins, such as "teacher=DIR".

    Raises:
        InputError: it guesses.
    """
    guess = math.log(len(data.tokenizer))
    if not loss < guess - BETTER_THAN_A_GUESS:
        raise InputError(
            f"{where}: its LM loss is {loss:.3f} nats on the held-out data, where guessing costs "
            f"{guess:.3f}: its weights are not those that were trained, or the data is not for it"
        )
    logger.info("teacher: LM loss %.3f nats on held-out data", loss)
    frequencies = unigram_entropy_nats(data.indexed.paths("valid"))
    if loss >= frequencies:
        logger.warning(
            "teacher: its LM loss, %.3f nats, is no better than the frequency of each token (%.3f)",
            loss,
            frequencies,
        )
    return loss
