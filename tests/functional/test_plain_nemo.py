"""examples/plain_nemo.py: the callback and the transform in a nemo.lightning script, without a recipe."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.functional.conftest import Teacher
from tests.functional.test_prune import TARGET
from tests.support import ranks, sessions
from tests.support.commands import ROOT, SEQ_LENGTH, VOCAB_SIZE, Commands

SCRIPT = ROOT / "examples" / "plain_nemo.py"


@pytest.fixture(scope="module")
def output(commands: Commands, teacher: Teacher) -> Path:
    directory = commands.home / "plain"
    directory.mkdir()
    # The corpus of the recipes, indexed by them.
    corpus = teacher.corpus(commands.cache)
    arguments = [teacher.run_dir / "checkpoint", corpus / "train", corpus / "valid", directory]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=commands.environment(PYTHONPATH=str(ROOT)),
        cwd=commands.home,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def student_of(output: Path) -> Path:
    (student,) = (output / "student" / "checkpoints").glob("*-last")
    return student


def test_scores_are_of_the_sequences_it_says(output: Path) -> None:
    from nemo_minitron.importance.scores import Scores

    scores = Scores.load(output / "scores.safetensors")
    assert (scores.samples, scores.tokens) == (32, 32 * SEQ_LENGTH)


def test_weights_and_optimizer_have_the_target_s_sizes(output: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    contents = FileSystemReader(str(student_of(output) / "weights")).read_metadata().state_dict_metadata
    sizes = {name: math.prod(entry.size) for name, entry in contents.items() if hasattr(entry, "size")}
    moments = {name: size for name, size in sizes.items() if name.startswith("optimizer.state.exp_avg.")}
    weights = {name: size for name, size in sizes.items() if not name.startswith("optimizer.")}
    assert sum(moments.values()) == TARGET.parameters()
    assert sum(weights.values()) == TARGET.parameters()


def test_the_student_is_the_teacher_s_kept_weights_two_small_steps_on(
    output: Path, teacher: Teacher, tmp_path: Path
) -> None:
    """It reloads, in one process, and every weight has moved by no more than two steps of Adam at 1e-4 can."""
    import json

    from transformers import LlamaForCausalLM

    from tests.functional.test_student_loads import cut

    ranks.run_on_ranks(1, sessions.exported, str(student_of(output)), str(tmp_path / "hf"), timeout=240)
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    untrained = cut(teacher.huggingface, json.loads((output / "plan.json").read_text())).state_dict()
    assert trained.keys() == untrained.keys()
    assert trained["model.embed_tokens.weight"].shape == (VOCAB_SIZE, TARGET.hidden_size)
    for name in trained:
        moved = (trained[name] - untrained[name]).abs().max().item()
        assert 0 < moved < 3e-4, name
    assert not torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])
