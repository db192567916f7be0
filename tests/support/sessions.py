"""NeMo sessions inside the kept ranks: a checkpoint opened under a layout, as the recipes open it."""

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import ROOT, layout

MICRO_BATCH = 2
# NeMo's imports, on a busy machine.
PATIENCE_S = 240


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _launched() -> Iterator[None]:
    """What a launcher says to each rank; the harness has made the process group itself."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import base

    # Megatron compares the ranks' counts of saves, and not all of the kept ranks took part in each earlier one.
    base.async_calls.call_idx = -1
    values = {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "localhost",
        # Used only where a conversion has closed the group and NeMo makes one of its own: not by two test processes.
        "MASTER_PORT": str(_free_port()),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    # Megatron writes a checkpoint's files from child processes, which the harness's daemons may not have.
    process: Any = multiprocessing.current_process()
    daemon = process._config.pop("daemon", False)
    try:
        yield
    finally:
        process._config["daemon"] = daemon
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def samples(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Items as Megatron's GPTDataset gives them, of tokens int64 [n, s + 1]."""
    length = tokens.shape[1] - 1
    return [
        {
            "tokens": row[:-1],
            "labels": row[1:],
            "position_ids": torch.arange(length),
            "loss_mask": torch.ones(length),
        }
        for row in tokens
    ]


def open_session(checkpoint: str | Path, **sizes: Any) -> Any:
    """A session of this rank; every rank of the layout calls it."""
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.config.trainer import TrainerConfig
    from nemo_minitron.nemo.session import Session

    t = TrainerConfig(**sizes, micro_batch_size=MICRO_BATCH, global_batch_size=8)
    # The harness has made the process group, so NeMo leaves Megatron's parallel state to it as well.
    layout(t.tensor_model_parallel_size, t.pipeline_model_parallel_size)
    with _launched():
        return Session(find_source(checkpoint), t)


def loss_under(checkpoint: str, tokens: Tensor, sizes: dict[str, Any]) -> float:
    """The LM loss in nats over tokens [n, s + 1], of a checkpoint opened under a layout."""
    from nemo_minitron.evaluation.lm_loss import lm_loss

    session = open_session(checkpoint, **sizes)
    data = samples(tokens)
    return lm_loss(session.chunks, data, len(data), micro_batch_size=MICRO_BATCH).nats


def logits_of(checkpoint: str, tokens: Tensor) -> Tensor:
    """Logits [n, s, v] of one process for tokens [n, s]."""
    (model,) = open_session(checkpoint).chunks
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, None).float()


def logits_layer_by_layer(checkpoint: str, tokens: Tensor) -> Tensor:
    """The same with one layer in memory."""
    from nemo_minitron.checkpoints.source import contents, find_source
    from nemo_minitron.export.distributed_reader import DistributedReader
    from nemo_minitron.workflows.export.layer_by_layer import logits

    source = find_source(checkpoint)
    layout(1, 1)
    with _launched():
        reader = DistributedReader(source.path / "weights", contents(source))
        return logits(source, reader, tokens, vocab_rows=source.architecture.vocab_size)


def logits_of_forms(sources: list[str], cache: str, tokens: Tensor) -> list[Any]:
    """Of each Hugging Face directory: its NeMo 2 form and that one's logits [n, s, v]; a refusal's message instead."""
    from nemo_minitron.errors import InputError

    found: list[Any] = []
    for source in sources:
        try:
            nemo = imported(source, cache)
        except InputError as error:
            found.append(str(error))
        else:
            found.append((nemo, logits_of(nemo, tokens)))
    return found


def saved_again(checkpoint: str, output: str, sizes: dict[str, Any]) -> None:
    """Opens a checkpoint under a layout and saves it from there."""
    session = open_session(checkpoint, **sizes)
    with _launched():
        session.save(Path(output))


def saved_while_rank_0_tidies(checkpoint: str, output: str, sizes: dict[str, Any], seconds: float) -> None:
    """As `saved_again`; rank 0 takes so long to remove what is not there, and fails where another rank has begun."""
    from nemo_minitron import files

    def slow(path: Path) -> None:
        time.sleep(seconds)
        assert not path.exists(), f"another rank writes to {path}, which is about to be removed"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "remove", slow)
        saved_again(checkpoint, output, sizes)


def pruned(checkpoint: str, output: str, plan: Any, sizes: dict[str, Any]) -> None:
    """Opens a checkpoint under a layout, prunes it there and saves the student."""
    from nemo_minitron.nemo.prune_transform import prune_model

    session = open_session(checkpoint, **sizes)
    prune_model(session.model, session.chunks, plan)
    with _launched():
        session.save(Path(output))


def imported(source: str, cache: str) -> str:
    """The NeMo 2 form of a Hugging Face directory; one process."""
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.nemo.huggingface import import_checkpoint

    layout()  # NeMo takes a process group that is there as it is
    with _launched():
        return str(import_checkpoint(find_source(source), Path(cache)))


def exported(source: str, output: str) -> str:
    """The Hugging Face form of a NeMo 2 directory; one process."""
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.nemo.huggingface import export_checkpoint

    layout()
    with _launched():
        return str(export_checkpoint(find_source(source), Path(output)))


def searched(overrides: list[str]) -> dict[str, Any]:
    """The work of recipes/search.py in one process, of a source that needs no conversion; what goes to result.json."""
    from hydra import compose, initialize_config_dir

    from nemo_minitron.config.recipes import SearchRecipe, parse
    from nemo_minitron.workflows.search.check import check
    from nemo_minitron.workflows.search.run import run

    layout(1, 1)
    with _launched(), initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        recipe = parse(SearchRecipe, compose("search", overrides=overrides))
        Path(recipe.run_dir).mkdir(parents=True)
        return run(recipe, check(recipe), Path(recipe.run_dir))


def pruned_under(overrides: list[str], sizes: dict[str, Any]) -> dict[str, Any]:
    """The work of recipes/prune.py under a layout, of a source that needs no conversion; what goes to result.json."""
    import torch.distributed as dist
    from hydra import compose, initialize_config_dir

    from nemo_minitron.config.recipes import PruneRecipe, parse
    from nemo_minitron.workflows.prune.check import check
    from nemo_minitron.workflows.prune.run import run

    layout(sizes.get("tensor_model_parallel_size", 1), sizes.get("pipeline_model_parallel_size", 1))
    with _launched(), initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        named = [f"trainer.{name}={value}" for name, value in sizes.items()]
        recipe = parse(PruneRecipe, compose("prune", overrides=[*overrides, *named]))
        directory = Path(recipe.run_dir)
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        return run(recipe, check(recipe), directory)


def distilled_under(
    overrides: list[str], sizes: dict[str, Any], spoiled_after: int | None = None
) -> dict[str, Any]:
    """The work of recipes/distill.py under a layout; what goes to result.json.

    `spoiled_after`: all weights turn to NaN right after so many optimizer steps.
    """
    import torch.distributed as dist
    from hydra import compose, initialize_config_dir
    from megatron.core import num_microbatches_calculator

    from nemo_minitron.config.recipes import DistillRecipe, parse
    from nemo_minitron.workflows.distill.check import check
    from nemo_minitron.workflows.distill.run import run

    # An earlier training in this process may have had other batches.
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    layout(
        sizes.get("tensor_model_parallel_size", 1),
        sizes.get("pipeline_model_parallel_size", 1),
        sp=sizes.get("sequence_parallel", False),
    )
    with (
        _launched(),
        _spoiled(spoiled_after),
        initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")),
    ):
        named = [f"trainer.{name}={value}" for name, value in sizes.items()]
        recipe = parse(DistillRecipe, compose("distill", overrides=[*overrides, *named]))
        directory = Path(recipe.run_dir)
        if dist.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        return run(recipe, check(recipe), directory)


@contextlib.contextmanager
def _spoiled(after: int | None) -> Iterator[None]:
    import lightning.pytorch as pl

    from nemo_minitron.nemo import trainer

    class Spoiler(pl.Callback):
        def on_train_batch_end(self, running: Any, module: Any, *rest: Any) -> None:
            if running.global_step == after:
                for parameter in module.parameters():
                    parameter.data.fill_(torch.nan)

    make = trainer.trainer

    def made(*args: Any, callbacks: Any = None, **options: Any) -> Any:
        return make(*args, callbacks=[Spoiler(), *(callbacks or [])], **options)

    trainer.trainer = made
    try:
        yield
    finally:
        trainer.trainer = make


def answered_under(
    checkpoint: str,
    requests: list[tuple[list[int], int]],
    prompts: list[list[int]],
    stops: list[str],
    ends: list[int],
    sizes: dict[str, Any],
) -> tuple[list[tuple[float, bool]], list[list[int]]]:
    """What recipes/evaluate.py asks of a checkpoint under a layout: log-likelihoods, and six new tokens a prompt; as
    the first rank gets them."""
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.environment import rank
    from nemo_minitron.evaluation.multiple_choice import Request
    from nemo_minitron.workflows.evaluate.model import ShardedModel

    session = open_session(checkpoint, **sizes)
    with _launched():
        model = ShardedModel(session, load_tokenizer(session.source.tokenizer), ends, batch_size=3)
        if rank() != 0:
            model.serve()
            return [], []
        found = model.log_likelihoods([Request(*request) for request in requests])
        written = model.write(prompts, 6, stops)
        model.dismiss()
        return found, written


def figures_under(checkpoint: str, teacher: str, tokens: Tensor, sizes: dict[str, Any]) -> Any:
    """`evaluation.lm_figures` over tokens [n, s + 1] of a checkpoint beside a teacher, both under a layout."""
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.evaluation.lm_figures import lm_figures
    from nemo_minitron.nemo.session import nemo_tokenizer
    from nemo_minitron.nemo.teacher import Teacher

    session, source = open_session(checkpoint, **sizes), find_source(teacher)
    data, strategy = samples(tokens), session.trainer.strategy
    with _launched():
        beside = Teacher(source, strategy, nemo_tokenizer(source.tokenizer), tokens.shape[1] - 1, "32")
    return lm_figures(
        session.chunks,
        data,
        len(data),
        source.architecture.vocab_size,
        batch_size=MICRO_BATCH,
        teacher=[beside.chunk],
    )
