"""Where a training run's figures also go while it runs."""

import importlib.util
from dataclasses import dataclass
from typing import Annotated

from nemo_minitron.config.ranges import Choice
from nemo_minitron.errors import InputError


@dataclass
class LoggerConfig:
    """Where the figures of RUN/steps.jsonl also go while a training runs.

    `name`: "none", "tensorboard" (into RUN/tensorboard) or "wandb" (into RUN/wandb). `project`: of W&B. `offline`: W&B
    keeps what it would send.
    """

    name: Annotated[str, Choice("none", "tensorboard", "wandb")] = "none"
    project: str = "nemo_minitron"
    offline: bool = True


def check_logger(logger: LoggerConfig) -> None:
    """Refuse a logger whose package is not here.

    Raises:
        InputError: names it and how to get it.
    """
    if logger.name != "none" and importlib.util.find_spec(logger.name) is None:
        how = "make setup EXTRAS=wandb" if logger.name == "wandb" else "pip install tensorboard"
        raise InputError(f"logger={logger.name}: the package {logger.name} is not installed; {how}")
