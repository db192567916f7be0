"""The passage category of the project's own instruct set: a question about a few given facts, or about none of them."""

import json
from typing import Any

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.data.instruct.checks import share_passed
from nemo_minitron.data.instruct.generate import samples
from nemo_minitron.evaluation.benchmarks.items import written

ITEMS = 100
_SEED = 1234  # that of recipes/evaluate_instruct.py, and so its questions


def config(_: DataConfig) -> dict[str, Any]:
    """The harness's task: of the held-out wordings. `right`: all checks hold; `right_lenient`: a careful reader's."""
    items = [
        {
            "prompt": row["messages"][0]["content"],
            # As text: a table of all items would give each the others' keys.
            "checks": json.dumps(row["checks"]),
            "lenient": json.dumps(row["lenient"]),
        }
        for row in samples("test", ITEMS, _SEED)
        if row["category"] == "passage"
    ]
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("right", "right_lenient")
    ]
    return written(items, 64, _score, metrics)


def _score(item: dict[str, Any], answer: str) -> dict[str, float]:
    strict, lenient = (share_passed(json.loads(item[name]), answer) == 1 for name in ("checks", "lenient"))
    return {"right": float(strict), "right_lenient": float(strict or lenient)}
