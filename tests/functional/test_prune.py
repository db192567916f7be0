"""recipes/prune.py +conf=width as a user types it, in one process."""

import json
import math
from pathlib import Path

from nemo_minitron.arch import Architecture
from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import SIZES, VOCAB_SIZE, Commands, tree

SOURCE = Architecture(**SIZES, vocab_size=VOCAB_SIZE, model_type="llama")
TARGET = SOURCE.replace(hidden_size=48, ffn_hidden_size=80)


def saved_elements(checkpoint: Path) -> int:
    """Weights in a distributed checkpoint, by torch's own table of contents."""
    from torch.distributed.checkpoint import FileSystemReader

    contents = FileSystemReader(str(checkpoint / "weights")).read_metadata().state_dict_metadata
    return sum(math.prod(entry.size) for entry in contents.values() if hasattr(entry, "size"))


def test_the_result(pruned: Pruned, teacher: Teacher) -> None:
    result = pruned.result
    assert pruned.ended.stdout.splitlines()[-1] == str((pruned.run_dir / "result.json").resolve())
    assert (result["params_before"], result["params_after"]) == (SOURCE.parameters(), TARGET.parameters())
    assert result["target"] == TARGET.to_dict()
    assert result["calibration_samples"] == 32
    assert result["eval_samples"] == 32
    # The loss before pruning is the loss that the training measured on the same sequences.
    assert math.isclose(result["lm_loss_nats_before"], teacher.result["lm_loss_nats"], rel_tol=1e-5)
    assert result["lm_loss_nats_before"] < result["lm_loss_nats_after"] < 2 * math.log(VOCAB_SIZE)
    assert 1 < result["wall_s"] < pruned.ended.seconds
    assert 0.2 < result["peak_rss_gib"] < 8
    assert Path(result["checkpoint"]) == (pruned.run_dir / "checkpoint").resolve()


def test_the_artifacts(pruned: Pruned) -> None:
    plan = json.loads((pruned.run_dir / "plan.json").read_text())
    assert plan["version"] == 1
    assert plan["source_sha256"] == pruned.result["source_sha256"]
    assert len(plan["kept"]["hidden_size"]) == 48
    assert [len(kept) for kept in plan["kept"]["ffn_hidden_size"]] == [80] * 4
    assert plan["kept"]["num_attention_heads"] is None
    assert (pruned.run_dir / "scores.safetensors").stat().st_size > 4 * (64 + 4 * 128)
    assert (pruned.run_dir / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert not list(pruned.run_dir.glob(".checkpoint*"))


def test_the_checkpoint_holds_exactly_the_target(pruned: Pruned) -> None:
    assert saved_elements(pruned.run_dir / "checkpoint") == TARGET.parameters()
    context = (pruned.run_dir / "checkpoint" / "context" / "model.yaml").read_text()
    assert "hidden_size: 48\n" in context
    assert "ffn_hidden_size: 80\n" in context


def test_the_kept_units_are_the_best_scored(pruned: Pruned) -> None:
    from safetensors.torch import load_file

    scores = load_file(str(pruned.run_dir / "scores.safetensors"))
    plan = json.loads((pruned.run_dir / "plan.json").read_text())
    best = scores["hidden_size"].topk(48).indices.sort().values
    assert plan["kept"]["hidden_size"] == best.tolist()
    for layer in range(4):
        best = scores["ffn_hidden_size"][layer].topk(80).indices.sort().values
        assert plan["kept"]["ffn_hidden_size"][layer] == best.tolist()


def test_a_finished_run_is_not_overwritten_unasked(
    commands: Commands, pruned: Pruned, teacher: Teacher
) -> None:
    before = tree(pruned.run_dir)
    ended = commands.prune(teacher.huggingface, pruned.run_dir)
    assert (ended.code, ended.stdout) == (2, "")
    line = f"error: run_dir={pruned.run_dir}: already holds a result; choose another or say overwrite=true\n"
    assert ended.stderr == line
    assert tree(pruned.run_dir) == before


def test_an_unfinished_run_is_redone_and_a_finished_one_overwritten(
    commands: Commands, pruned: Pruned, teacher: Teacher
) -> None:
    """One run directory, first as a kill leaves it, with parts that must not survive, then finished; the sources are
    a NeMo 2 run and, of the second, the scores of the first."""
    run_dir = commands.home / "again"
    for leftover in (".checkpoint.tmp/weights", "checkpoint/weights/stale"):
        (run_dir / leftover).mkdir(parents=True)
    (run_dir / "plan.json").write_text("{")
    first = commands.prune(teacher.run_dir, run_dir).result()
    assert math.isclose(first["lm_loss_nats_after"], pruned.result["lm_loss_nats_after"], rel_tol=1e-6)
    kept = [json.loads((d / "plan.json").read_text())["kept"] for d in (run_dir, pruned.run_dir)]
    assert kept[0] == kept[1]
    assert not (run_dir / ".checkpoint.tmp").exists()
    assert not (run_dir / "checkpoint" / "weights" / "stale").exists()

    scores = commands.home / "scores.safetensors"
    (run_dir / "scores.safetensors").rename(scores)
    checkpoint = (teacher.run_dir / "checkpoint").resolve()
    second = commands.prune(
        checkpoint, run_dir, "overwrite=true", f"prune.scores={scores}", "prune.hidden_size=null"
    ).result()
    assert second["params_after"] == SOURCE.replace(ffn_hidden_size=80).parameters()
    assert saved_elements(run_dir / "checkpoint") == second["params_after"]
