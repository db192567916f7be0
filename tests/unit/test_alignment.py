"""Alignment runs without NeMo: schedules, the log, what a kill leaves, and encoded data."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_minitron.alignment import runs
from nemo_minitron.alignment.comparisons import encode_pairs
from nemo_minitron.alignment.runs import RunLog, keep_done, keep_one_checkpoint
from nemo_minitron.alignment.samples import Samples
from nemo_minitron.alignment.training import counting
from nemo_minitron.config.align import AlignConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.chat.conversations import Conversation, Preference
from nemo_minitron.data.chat.encoded import encode_split, with_text
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.align.check import check_settings, schedule, validation_batch

TEACHER = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"


def test_epochs_become_steps() -> None:
    t = TrainerConfig(micro_batch_size=2, data_parallel_size=2)
    a = AlignConfig(global_batch_size=8, max_epochs=3)
    # 50 samples are 6 whole batches; validation takes batches of 2 x 2.
    found, epochs = schedule(a, t, 50, 19, whole_batches=False)
    assert (found.max_steps, found.global_batch_size, epochs) == (18, 8, 3)
    assert (found.val_check_interval, found.limit_val_batches) == (18, 4)
    found, epochs = schedule(AlignConfig(global_batch_size=8, max_steps=7), t, 50, 19, whole_batches=True)
    assert (found.max_steps, epochs, found.limit_val_batches) == (7, 2, 2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"global_batch_size": 6}, "align.global_batch_size=6"),
        ({"global_batch_size": 64}, "align.train: 50 samples"),
        ({"global_batch_size": 24, "max_steps": 1}, "align.valid: 19 samples"),
        ({"samples": 17}, "align.samples=17: must be at most 16"),
        ({"samples": 9, "limit_val_batches": 1}, "align.samples=9: must be at most 8"),
    ],
)
def test_batches_that_the_data_does_not_fill_are_refused(settings: dict[str, int], says: str) -> None:
    t = TrainerConfig(micro_batch_size=2, data_parallel_size=2)
    with pytest.raises(InputError, match=says):
        schedule(AlignConfig(**settings), t, 50, 19, whole_batches=True)


@pytest.mark.parametrize(
    ("valid", "batch", "steps"), [(19, 16, 1), (16, 16, 1), (15, 14, 1), (3, 2, 1), (2, 2, 1)]
)
def test_a_small_validation_is_one_smaller_batch(valid: int, batch: int, steps: int) -> None:
    """Every data-parallel rank gets as many samples as every other."""
    t, a = TrainerConfig(micro_batch_size=8, data_parallel_size=2), AlignConfig(global_batch_size=16)
    assert validation_batch(a, t, valid, whole_batches=False) == batch
    assert schedule(a, t, 50, valid, whole_batches=False)[0].limit_val_batches == steps


@pytest.mark.parametrize(
    ("valid", "whole", "says"), [(1, False, "one batch of 2"), (15, True, "one batch of 16")]
)
def test_a_validation_that_fills_no_batch_is_refused(valid: int, whole: bool, says: str) -> None:
    t, a = TrainerConfig(micro_batch_size=8, data_parallel_size=2), AlignConfig(global_batch_size=16)
    with pytest.raises(InputError, match=f"align.valid: {valid} samples are less than {says}"):
        validation_batch(a, t, valid, whole_batches=whole)


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="align.packed_sequence=true"):
        check_settings(AlignConfig(packed_sequence=True), TrainerConfig())
    with pytest.raises(InputError, match=r"align.samples=1: .*context_parallel_size=2"):
        check_settings(AlignConfig(samples=1), TrainerConfig(context_parallel_size=2))


def test_a_kill_leaves_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "aligner" / "checkpoints"
    for step in (4, 8, 12):
        (saved / f"step={step}-consumed_samples={step * 8}-epoch=0-last").mkdir(parents=True)
    (saved / "step=8-consumed_samples=64-epoch=0").mkdir()
    (saved / "step=12-consumed_samples=96-epoch=0-last-unfinished").touch()
    keep_one_checkpoint(tmp_path)
    assert sorted(p.name for p in saved.iterdir()) == [
        "step=8-consumed_samples=64-epoch=0",
        "step=8-consumed_samples=64-epoch=0-last",
    ]
    keep_one_checkpoint(tmp_path / "nowhere")


def test_the_log_of_a_run_that_goes_on_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = RunLog(path, write=True, done=0)
    log.log_metrics({"loss": 3.0}, step=0, prefix="val/")
    for step in range(4):
        log.log_metrics({"loss": 2.0 - step / 10}, step=step, prefix="train/")
        if step == 1:
            log.log_metrics({"loss": 2.5}, step=2, prefix="val/")
    RunLog(tmp_path / "steps.jsonl", write=False, done=0)  # another rank
    again = RunLog(path, write=True, done=2)
    again.log_metrics({"loss": 1.5}, step=2, prefix="train/")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [
        ("valid", 0),
        ("train", 0),
        ("train", 1),
        ("valid", 2),
        ("train", 2),
    ]
    with pytest.raises(FloatingPointError, match="step 3"):
        again.log_metrics({"loss": float("nan")}, step=3, prefix="train/")


def test_a_step_tells_how_many_tokens_it_learned_from(tmp_path: Path) -> None:
    """Of conversations those under the mask, of pairs both answers'; Aligner's own figures stay."""
    labels = {
        "chosen_labels": torch.tensor([[-100, 5, 6], [-100, -100, 7]]),
        "rejected_labels": torch.tensor([[-100, 8, -100], [-100, 9, 9]]),
    }
    for batch, count in (({"loss_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])}, 3), (labels, 6)):
        loss, metrics = counting(lambda _: (2.5, {"loss": 2.5}))(batch)
        assert (loss, metrics) == (2.5, {"loss": 2.5, "tokens": count})
    path = tmp_path / "steps.jsonl"
    log = RunLog(path, write=True, done=0)
    log.log_metrics({"loss": 2.5, "tokens": 6, "step_time": 0.25}, step=0, prefix="train/")
    log.log_metrics({"loss": 2.5}, step=1, prefix="train/")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["tokens_per_s"], first["seconds"]) == (24.0, 0.25)
    assert "tokens_per_s" not in second


def test_answers_end_at_the_templates_end_marker(tmp_path: Path) -> None:
    """Or at the end of text, or where they are longest; of the last batch, those that are still wanted."""
    tokenizer = load_tokenizer(TEACHER)
    stop, end = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    yes, no = tokenizer.encode(" yes"), tokenizer.encode("no no no")
    path = tmp_path / "samples.jsonl"
    samples = Samples(SimpleNamespace(step=4), tokenizer, (stop,), AlignConfig(samples=3), path)
    samples._longest = len(no) - 1
    batch = {
        "contexts": torch.tensor([[end, *yes, *([end] * len(yes))], [end, *yes, *yes]]),
        "context_lengths": torch.tensor([1 + len(yes), 1 + 2 * len(yes)]),
        "answers": torch.tensor([[*yes, stop, end], [*yes, end, end]]),
    }
    output = {"token_ids": [[end, *yes, *yes, stop, *no], [end, *yes, *yes, *no]]}
    while samples.has_metrics():
        samples.update(batch, output)
    first = {"step": 4, "prompt": "<|endoftext|> yes", "answer": " yes", "reference": " yes"}
    second = {**first, "prompt": "<|endoftext|> yes yes", "answer": tokenizer.decode(no[:-1])}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, second, first]
    samples.reset()
    assert samples.has_metrics()
    assert samples.compute() == {}
    keep_done(path, 3)
    assert not path.exists()


def test_encoded_conversations_are_those_of_the_template(tmp_path: Path) -> None:
    """transformers' own tokens and its own reading of which are the assistant's."""
    tokenizer = with_template(load_tokenizer(TEACHER), "test")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "import os?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "And  sys?\n"},
        {"role": "assistant", "content": "def no():\n    pass"},
    ]
    split = encode_split(
        [Conversation(messages, "a.jsonl, line 1")],
        tokenizer,
        name="train",
        seq_length=512,
        overlong="refuse",
        directory=tmp_path,
    )
    (line,) = map(json.loads, Path(split.path).read_text().splitlines())
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert line["tokens"] == expected["input_ids"]
    assert line["loss_mask"] == expected["assistant_masks"]
    assert (split.samples, split.tokens, split.answer_tokens) == (
        1,
        len(expected["input_ids"]),
        sum(expected["assistant_masks"]),
    )


def test_replayed_text_is_learned_as_a_whole(tmp_path: Path) -> None:
    tokenizer = with_template(load_tokenizer(TEACHER), "test")
    messages = [{"role": "user", "content": "import os?"}, {"role": "assistant", "content": "yes"}]
    one = Conversation(messages, "a.jsonl, line 1")
    arguments = {"name": "train", "seq_length": 64, "overlong": "refuse", "directory": tmp_path}
    split = encode_split([one, one], tokenizer, **arguments)  # type: ignore[arg-type]
    more = with_text(split, [[5, 6, 7, 8], [9, 10, 11, 12]], tmp_path)
    before, after = (Path(each.path).read_text().splitlines() for each in (split, more))
    assert after[:2] == before
    assert [json.loads(line) for line in after[2:]] == [
        {"tokens": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 1]},
        {"tokens": [9, 10, 11, 12], "loss_mask": [0, 1, 1, 1]},
    ]
    assert (more.samples, more.replayed, split.replayed) == (4, 2, 0)
    assert (more.tokens - split.tokens, more.answer_tokens - split.answer_tokens) == (8, 6)


def test_replay_is_refused_where_text_would_outweigh_answers() -> None:
    check_settings(AlignConfig(replay=0.3), TrainerConfig(micro_batch_size=1))
    with pytest.raises(InputError, match=r"align.replay=0.3: trainer.micro_batch_size=4 must be 1"):
        check_settings(AlignConfig(replay=0.3), TrainerConfig(micro_batch_size=4))


def test_rendered_pairs_are_prompt_and_continuation(tmp_path: Path) -> None:
    tokenizer = with_template(load_tokenizer(TEACHER), "test")
    prompt = [{"role": "user", "content": "Which one?"}]
    pair = Preference(prompt, "this", "that", "p.jsonl, line 1", 1.0, 0.0)
    arguments = {"name": "train", "seq_length": 64, "overlong": "refuse", "directory": tmp_path}
    split = encode_pairs([pair], tokenizer, preference_loss="rpo_sq", **arguments)  # type: ignore[arg-type]
    (line,) = map(json.loads, Path(split.path).read_text().splitlines())
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "that"}], tokenize=False)
    assert line["prompt"] + line["rejected_response"] == whole
    assert line["prompt"] == tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert (line["chosen_reward"], line["rejected_reward"]) == (1.0, 0.0)
    bare = Preference(prompt, "this", "that", "p.jsonl, line 7")
    with pytest.raises(InputError, match="p.jsonl, line 7: no chosen_reward"):
        encode_pairs([bare], tokenizer, preference_loss="rpo_sq", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cuda", "fused", "precision", "name"),
    [
        (False, False, "32", "sharded_adamw"),
        (True, False, "32", "sharded_adamw"),
        (True, False, "bf16-mixed", "mcore_distributed_optim"),
        (True, True, "32", "mcore_distributed_optim"),
    ],
)
def test_megatron_s_optimizer_clips_by_lightning_s_setting(
    cuda: bool, fused: bool, precision: str, name: str
) -> None:
    a, t = AlignConfig(), TrainerConfig(precision=precision, max_steps=2)
    optimizer = runs._optim(a, t, cuda=cuda, fused=fused)
    made = runs._trainer(t, a, "sft", 1, optimizer, cuda=cuda)
    assert optimizer["name"] == name
    assert made.get("gradient_clip_val") == (a.optim.clip_grad if name.startswith("mcore") else None)
    assert made["sft"]["gradient_clip_val"] == a.optim.clip_grad > 0
