"""What the alignment recipes refuse before a model is loaded, and what they prepare once for all ranks."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.alignment.prepared import Prepared, has_cuda
from nemo_minitron.alignment.runs import ALIGNER, keep_one_checkpoint
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.align import AlignConfig
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.chat.encoded import EncodedSplit, with_text
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.data.sequences import SplitSequences
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError
from nemo_minitron.files import remove_stale
from nemo_minitron.workflows.conversations import files_of, prepared_tokenizer
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted, settle_rates


def prepare(
    r: Any,
    encode: Callable[[str, list[str], Any], EncodedSplit],
    *,
    own_set: tuple[str, str],
    whole_batches: bool,
) -> Prepared:
    """Everything that alignment recipes check and make before ranks start.

    Args:
        r: a recipe with `student` and `align`.
        encode: makes a split of its name, its files and the tokenizer.
        own_set: the files of `data.instruct.InstructFiles` that stand for `align.train` and `align.valid` where neither
            is given.
        whole_batches: whether validation takes batches as large as training's.

    Raises:
        InputError: an invalid setting; a checkpoint that does not fit the layout or the tokenizer; what `encode`
            refuses; less data than a batch.
    """
    ready = r.prepared or {}
    check_settings(r.align, r.trainer)
    student = find_source(ready.get("student", r.student), "student", r.data)
    check_source("student", student, r.trainer, r.data.seq_length)
    _check_nemo_file(r, student)
    if ready:
        tokenizer = Path(ready["tokenizer"])
        train, valid = (EncodedSplit(**ready[name]) for name in ("train", "valid"))
    else:
        tokenizer = prepared_tokenizer(r.align.chat_template, student, r.data, "align.chat_template")
        loaded = load_tokenizer(str(tokenizer))
        files = files_of({n: getattr(r.align, n) for n in ("train", "valid")}, own_set, r.data, "align")
        # The smaller one first: too few of them are told at once.
        valid = encode("valid", files["valid"], loaded)
        validation_batch(r.align, r.trainer, valid.samples, whole_batches=whole_batches)
        train = encode("train", files["train"], loaded)
    corpus = prepare_data(r.data, str(student.tokenizer), ready.get("corpus"))
    check_vocabulary(student, corpus)
    if not ready:
        train = _replayed(r, train, corpus)
    trainer, epochs = schedule(r.align, r.trainer, train.samples, valid.samples, whole_batches=whole_batches)
    size = student.architecture.parameters()
    settle_rates(r.align.optim, "align.optim", size, trainer.max_steps, prepared=bool(ready))
    if not ready:
        keep_resumable(r)
    return Prepared(converted(student, r.data), tokenizer, corpus, train, valid, trainer, epochs)


def _replayed(r: Any, train: EncodedSplit, corpus: PreparedData) -> EncodedSplit:
    """The training samples and, where `align.replay` asks for them, sequences of the corpus's train split."""
    share = r.align.replay
    count = round(train.samples * share / (1 - share))
    if not count:
        return train
    text = SplitSequences(corpus, r.data, "train", count)
    return with_text(
        train, [text.tokens(i).tolist() for i in range(count)], cache_dir(r.data, "conversations")
    )


def _check_nemo_file(r: Any, student: Source) -> None:
    """Refuse a .nemo file whose tables would be longer than the vocabulary: nothing in it says so to its readers."""
    rows, ranks = student.architecture.vocab_size, r.trainer.tensor_model_parallel_size
    if r.align.save_nemo and rows % ranks:
        raise InputError(
            f"align.save_nemo=true: trainer.tensor_model_parallel_size={ranks} does not divide the student's "
            f"vocab_size {rows}, and the file would hold padding; must be false, or a size that divides"
        )


def check_settings(a: AlignConfig, t: TrainerConfig) -> None:
    """Refuse settings that do not fit each other, and what needs Transformer Engine or CUDA where they are not.

    Raises:
        InputError: names the key, its value and what would be legal.
    """
    if a.packed_sequence and importlib.util.find_spec("transformer_engine") is None:
        raise InputError("align.packed_sequence=true: needs Transformer Engine, which is not here")
    if a.packed_sequence:
        raise InputError(
            "align.packed_sequence=true: NeMo-Aligner does not pack conversations; must be false"
        )
    if a.replay and t.micro_batch_size > 1:
        raise InputError(
            f"align.replay={a.replay}: trainer.micro_batch_size={t.micro_batch_size} must be 1: a loss is the mean of "
            "a microbatch's tokens, and those of a text would outweigh the answers beside it"
        )
    if a.samples and t.context_parallel_size > 1:
        raise InputError(
            f"align.samples={a.samples}: must be 0 under trainer.context_parallel_size={t.context_parallel_size}"
        )
    if t.precision != "32" and not has_cuda():
        raise InputError(f"trainer.precision={t.precision}: alignment on the CPU runs in 32")
    if a.peft == "lora" and t.sequence_parallel and importlib.util.find_spec("transformer_engine") is None:
        raise InputError("align.peft=lora: under trainer.sequence_parallel=true it needs Transformer Engine")
    if a.peft == "lora" and a.lora.dim % t.tensor_model_parallel_size:
        raise InputError(
            f"align.lora.dim={a.lora.dim}: must be a multiple of trainer.tensor_model_parallel_size="
            f"{t.tensor_model_parallel_size}"
        )


def schedule(
    a: AlignConfig, t: TrainerConfig, train: int, valid: int, *, whole_batches: bool
) -> tuple[TrainerConfig, int]:
    """The trainer's settings with steps and batches, and the epochs that they begin.

    Args:
        train, valid: samples.
        whole_batches: see `validation_batch`.

    Raises:
        InputError: batches that do not divide, fewer samples than a batch has, or than answers shall be written.
    """
    if train < a.global_batch_size:
        raise InputError(f"align.train: {train} samples are less than one batch of {a.global_batch_size}")
    validated = validation_batch(a, t, valid, whole_batches=whole_batches)
    in_epoch = train // a.global_batch_size
    steps = a.max_steps or a.max_epochs * in_epoch
    every = min(a.val_check_interval or steps, steps)
    validations = min(a.limit_val_batches or valid, valid // validated)
    if a.samples > validations * validated:
        raise InputError(
            f"align.samples={a.samples}: must be at most {validations * validated}, the samples of a validation"
        )
    settled = dataclasses.replace(
        t,
        max_steps=steps,
        global_batch_size=a.global_batch_size,
        val_check_interval=every,
        limit_val_batches=validations,
    )
    return settled, -(-steps // in_epoch)


def validation_batch(a: AlignConfig, t: TrainerConfig, valid: int, *, whole_batches: bool) -> int:
    """Samples of one step of a validation, over all ranks.

    Args:
        valid: samples.
        whole_batches: whether validation takes batches as large as training's; else one micro-batch a data-parallel
            rank, which is smaller where there are not as many samples.

    Raises:
        InputError: batches that do not divide, or fewer samples than a batch has.
    """
    dp = t.data_parallel_size
    smallest = t.micro_batch_size * dp
    if a.global_batch_size % smallest:
        raise InputError(
            f"align.global_batch_size={a.global_batch_size}: must be a multiple of trainer.micro_batch_size "
            f"{t.micro_batch_size} x trainer.data_parallel_size {dp}"
        )
    batch = a.global_batch_size if whole_batches else min(smallest, max(valid // dp, 1) * dp)
    if valid < batch:
        raise InputError(f"align.valid: {valid} samples are less than one batch of {batch}")
    return batch


def keep_resumable(r: Any) -> None:
    """Put the checkpoints of a run that was killed in order; a run that is overwritten begins anew."""
    directory = Path(r.run_dir)
    if r.overwrite and (directory / RESULT).exists():
        remove_stale(directory / ALIGNER)
    keep_one_checkpoint(directory)
