"""The README's script: nemo.lightning alone, with our callback and transform in it."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from nemo_minitron.config import DataConfig
from nemo_minitron.data.prepare import prepare_data
from tests.functional.commands import Commands
from tests.functional.conftest import Pruned

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "plain_nemo.py"


def test_the_readme_shows_it() -> None:
    assert f"```python\n{SCRIPT.read_text()}```\n" in (ROOT / "README.md").read_text()


def test_it_trains_a_student_of_the_targets_sizes(commands: Commands, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned.run_dir / "checkpoint"
    tokenizer = next((checkpoint / "context").glob("*/tokenizer.json")).parent
    text = tmp_path / "text.txt"
    text.write_text("a few words, again and again: " * 4000)
    data = DataConfig(
        name="files", seq_length=64, train=str(text), valid=str(tmp_path / "v*.md"), cache_dir=str(tmp_path)
    )
    (tmp_path / "valid.md").write_text("other words, again and again: " * 2000)
    indexed = prepare_data(data, str(tokenizer)).indexed
    output = tmp_path / "out"
    output.mkdir()
    subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            str(checkpoint),
            indexed.train_prefix,
            indexed.valid_prefix,
            str(output),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=400,
    )
    (saved,) = (output / "checkpoints").glob("*-last")
    config = yaml.safe_load((saved / "context" / "model.yaml").read_text())["config"]
    # 3/4 of 48; 9/14 of 80 is 51.4, and the nearest multiple of 4 is 52.
    assert (config["hidden_size"], config["ffn_hidden_size"]) == (36, 52)
