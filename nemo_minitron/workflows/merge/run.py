"""The work of `recipes/merge.py`: merge models of one architecture, a tensor at a time."""

import time
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import origin
from nemo_minitron.config.merge import MergeRecipe
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.workflows.merge import written
from nemo_minitron.workflows.merge.check import Prepared, tensors_of


def run(r: MergeRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write the merged model.

    Returns:
        The fields of `result.json`.

    Raises:
        FailedRun: a merged tensor is not finite.
    """
    begin = time.monotonic()
    merge = prepared.merge
    tensors = tensors_of(merge, prepared.sources, prepared.readers)
    fields = written.write(r, prepared, merge, tensors, directory)
    return {
        "recipe": "merge",
        "method": merge.method,
        "models": [origin.absolute(model) for model in merge.models],
        # What the runs before this one are found by: the base, or the first model.
        "source": origin.absolute(merge.paths[0]),
        "base": None if merge.base is None else origin.absolute(merge.base),
        "source_sha256": prepared.sha256[0],
        "models_sha256": prepared.sha256,
        "merge": merge.plain(),
        **fields,
        "write_s": round(time.monotonic() - begin, 2),
        "peak_rss_gib": peak_rss_gib(),
    }
