"""TensorBoard and W&B, as Lightning's loggers that NeMo's and Aligner's trainers take."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.logger import LoggerConfig


def trackers(logger: LoggerConfig, directory: Path) -> dict[str, Any]:
    """By the names of NeMoLogger's arguments; empty where none is wanted. Only rank 0's write.

    Args:
        directory: the run's; a run that goes on adds to what is there.
    """
    from lightning.pytorch import loggers

    if logger.name == "tensorboard":
        return {"tensorboard": loggers.TensorBoardLogger(str(directory), name="tensorboard", version="")}
    if logger.name == "wandb":
        name = directory.resolve().name
        made = loggers.WandbLogger(
            name=name,
            id=name,
            project=logger.project,
            save_dir=str(directory),
            offline=logger.offline,
            resume="allow",
        )
        return {"wandb": made}
    return {}
