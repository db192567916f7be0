"""The work of `recipes/instruct_data.py`: generate the project's own instruct set, or convert and check a file."""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.instruct import InstructDataRecipe
from nemo_minitron.data.chat.conversations import write_jsonl

if TYPE_CHECKING:
    pass
from nemo_minitron.workflows.instruct_data.check import Prepared


def run(r: InstructDataRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write RUN/*.jsonl.

    Returns:
        The fields of `result.json`: the files, how many samples each has, and what happened to long ones.
    """
    d = r.instruct_data
    files = {
        split: write_jsonl(directory / f"{split}.jsonl", (sample.to_json() for sample in samples))
        for split, samples in prepared.samples.items()
    }
    if prepared.generated is not None:
        for name, path in vars(prepared.generated).items():
            files[name] = Path(shutil.copy(path, directory / path.name))
    fields: dict[str, Any] = {"recipe": "instruct_data", "input": d.input, "seed": r.seed}
    for name, path in files.items():
        content = path.read_bytes()
        fields |= {name: str(path.resolve()), f"{name}_samples": content.count(b"\n")}
        fields[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
    if prepared.fitted is not None:
        if d.max_tokens is not None:
            print(prepared.fitted.line(d.max_tokens), flush=True)
        fields |= {f"{name}_of_input": value for name, value in asdict(prepared.fitted).items()}
    return fields
