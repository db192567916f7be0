"""What a recipe hands to a launcher that starts it later, elsewhere: a configuration with nothing left to compose."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.recipes import CommonConfig, merged, parse

# In a configuration that is started without conf/common.yaml, which says the same: a run keeps its own record.
HYDRA_WRITES_NOTHING: dict[str, Any] = {
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job_logging": {"root": None}}
}


def hand_over(config: DictConfig, schema: type[CommonConfig], file: Path) -> CommonConfig:
    """Check a configuration as far as it can be without opening what it names, and append it to `file`.

    A line is a JSON object: `config`, resolved; `cluster`, with defaults; `ranks`; `num_nodes`; `missing`, the keys
    that have no value yet and hold their own name in angle brackets.

    Args:
        file: JSON lines; a sweep adds one for each of its configurations.

    Returns:
        The configuration as its schema has it.

    Raises:
        InputError: as `config.parse`, but for missing values.
    """
    missing = sorted(OmegaConf.missing_keys(merged(schema, _container(config))))
    for key in missing:
        OmegaConf.update(config, key, f"<{key}>", force_add=True)
    parsed = parse(schema, config)
    line = {
        "config": {**_container(config), "cluster": None},
        "cluster": None if parsed.cluster is None else dataclasses.asdict(parsed.cluster),
        "ranks": parsed.trainer.ranks,
        "num_nodes": parsed.trainer.num_nodes,
        "missing": missing,
    }
    with open(file, "a") as opened:
        opened.write(json.dumps(line) + "\n")
    return parsed


def _container(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
