"""recipes/pretrain.py: a small teacher from scratch, measured and exported."""

import json
import math
import os
import platform
import stat
from pathlib import Path

from nemo_minitron.arch import Architecture
from tests.functional.conftest import Teacher
from tests.support.commands import SEQ_LENGTH, SIZES, VOCAB_SIZE, Commands, tree

ARCH = Architecture(**SIZES, vocab_size=VOCAB_SIZE)


def test_the_result_says_how_good_it_is(teacher: Teacher) -> None:
    result = teacher.result
    assert result["params"] == ARCH.parameters()
    assert (result["steps"], result["seed"]) == (30, 1234)
    assert result["tokens"] == 30 * 8 * SEQ_LENGTH
    lines = [json.loads(line) for line in (teacher.run_dir / "steps.jsonl").read_text().splitlines()]
    trained = [(line["step"], line["tokens"]) for line in lines if line["split"] == "train"]
    assert trained == [(step, 8 * SEQ_LENGTH) for step in range(30)]
    assert result["command"].startswith("python ")
    assert "trainer.max_steps=30" in result["command"]
    # Thirty steps suffice to beat the uniform guess, and words are harder to guess than the unigrams'.
    assert result["lm_loss_nats"] < math.log(VOCAB_SIZE) - 0.5
    assert 0 < result["unigram_entropy_nats"] < math.log(VOCAB_SIZE)
    assert 0 < result["xz_bits_per_byte_given_train"] < result["xz_bits_per_byte_alone"] < 8
    assert 0 < result["bits_per_byte"] < 8


def test_bits_per_byte_is_the_loss_over_the_held_out_text(teacher: Teacher) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(teacher.huggingface / "tokenizer.json"))
    texts = [path.read_text() for path in sorted((Path(os.__file__).parent / "json").glob("*.py"))]
    texts = [text for text in texts if text.strip()]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    bits = teacher.result["lm_loss_nats"] / math.log(2) * tokens / sum(len(t.encode()) for t in texts)
    assert math.isclose(teacher.result["bits_per_byte"], bits, rel_tol=1e-6)


def test_checkpoint_is_a_link_that_moves_with_the_run(teacher: Teacher) -> None:
    link = teacher.run_dir / "checkpoint"
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))
    assert (link / "weights" / "metadata.json").is_file()
    assert (link / "context" / "model.yaml").is_file()
    assert teacher.result["checkpoint"] == str(link.resolve())


def test_the_export_can_be_read_by_anyone_and_has_a_card(teacher: Teacher) -> None:
    for file in teacher.huggingface.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
    config = json.loads((teacher.huggingface / "config.json").read_text())
    assert (config["head_dim"], config["num_key_value_heads"]) == (8, 4)
    card = (teacher.huggingface / "README.md").read_text()
    result = teacher.result
    for value in (
        result["command"],
        str(result["seed"]),
        f"{result['tokens']:,}",
        f"{result['lm_loss_nats']:.4f}",
        f"{result['bits_per_byte']:.4f}",
        f"{result['xz_bits_per_byte_alone']:.4f}",
        f"{result['unigram_entropy_nats']:.4f}",
        platform.python_version(),
        result["data_sha256"],
    ):
        assert value in card


def test_a_finished_training_is_measured_again_without_a_step(commands: Commands, teacher: Teacher) -> None:
    """Its result removed, as by a kill during the measurement: nothing is trained anew, the rest is redone."""
    (teacher.run_dir / "result.json").unlink()
    trained = tree(teacher.run_dir / "nemo" / "checkpoints")
    export = commands.home / "teacher-hf-again"
    result = commands.pretrain(teacher.run_dir, "trainer.max_steps=30", f"export_dir={export}").result()
    assert tree(teacher.run_dir / "nemo" / "checkpoints") == trained
    assert result["lm_loss_nats"] == teacher.result["lm_loss_nats"]
    first, second = (d / "model.safetensors" for d in (teacher.huggingface, export))
    assert first.read_bytes() == second.read_bytes()
