"""A data set for a spawned worker whose samples are pandas frames."""

from typing import Any

import pandas
import torch


class Samples(torch.utils.data.Dataset):
    """Two frames of one column."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return pandas.DataFrame({"a": [index, index + 1]})


def frames(samples: list[Any]) -> Any:
    """The one sample of a batch."""
    return samples[0]
