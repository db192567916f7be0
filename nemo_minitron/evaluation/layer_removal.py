"""Losses of a sharded Megatron GPT with blocks of its layers left out, each run from where it starts to differ."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from nemo_minitron import parallel
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.lm_loss import evaluating, stacked
from nemo_minitron.megatron_gpt import gpt_model

# The first layer that is left out (0-based, global), and how many are.
Block = tuple[int, int]


class LayerRemoval:
    """Runs microbatches through a model as a whole and without each of several blocks of layers.

    The whole model's pass keeps the residual state at the input of every layer; a pass without the layers i to
    i + n - 1 takes the state at layer i to layer i + n. So all L single removals cost about (L + 1) / 2 passes and L
    output layers. The passes are GPTModel's own forward, handed the state and shown only the layers that are left:
    embeddings, rotary tables, masks, final norm, output layer and vocabulary-parallel loss are Megatron's.

    Under pipeline parallelism every pass walks through the stages: one whose block starts on this stage or later
    ones starts there, one that has started arrives from the stage before. A block may reach over stages; a stage
    whose layers are all left out hands on what arrived. The later stages have more to do.

    Memory: for one microbatch the states [s, b, h] ([s/tp, b, h] under sequence parallelism) at each of the
    stage's layers.

    A context manager: entering it makes a process group where there are several stages, so all ranks do.

    Args:
        chunks: this rank's GPTModel, in a list as everywhere; wrappers are looked through.
        blocks: what to leave out, one block a pass.

    Raises:
        InputError: virtual pipeline stages or context parallelism.

    Source: megatron/core/models/gpt/gpt_model.py@0.13.1 (`decoder_input`, `set_input_tensor`).
    """

    def __init__(self, chunks: Sequence[Any], blocks: Sequence[Block]) -> None:
        if len(chunks) > 1:
            raise InputError(
                f"{len(chunks)} virtual pipeline stages: layers can be left out with one stage a rank only"
            )
        if parallel.cp_size() > 1:
            raise InputError(
                f"context_parallel_size={parallel.cp_size()}: must be 1 where layers are left out"
            )
        self._model = gpt_model(chunks[0])
        self._layers = list(self._model.decoder.layers)
        counts = parallel.gather_over_pp(len(self._layers))
        # The stage's layers, as global indices.
        self._begin = sum(counts[: parallel.pp_rank()])
        self._end = self._begin + len(self._layers)
        assert all(n >= 1 and 0 <= i <= sum(counts) - n for i, n in blocks), blocks
        self._blocks = blocks
        self._states: dict[int, Tensor] = {}
        self._relay: parallel.PipelineRelay | None = None

    def __enter__(self) -> "LayerRemoval":
        self._relay = parallel.PipelineRelay()
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        # After a failure the other ranks may not come to the end; waiting for them would hide it.
        if self._relay is not None and kind is None:
            self._relay.close()
        self._relay = None

    def losses(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Each sample's loss, summed over its tokens, in nats.

        Args:
            batch: `tokens`, `labels`, `position_ids` int64 [b, s], `loss_mask` float32 [b, s], perhaps
                `attention_mask` bool [b, 1, s, s]; on every stage.

        Returns:
            Float64 [1 + blocks, b] on the last stage, the whole model's first, in the order of `blocks`; the same on
            all tensor-parallel ranks. None on other stages.
        """
        whole = self._whole(batch)
        without: dict[int, Tensor | None] = {}
        # In the order of their starts, the passes that arrive from the stage before come before the stage's own.
        for number in sorted(range(len(self._blocks)), key=lambda k: self._blocks[k]):
            without[number] = self._without(*self._blocks[number], batch)
        self._states.clear()
        if whole is None:
            return None
        return torch.stack([whole, *(_known(without[number]) for number in range(len(self._blocks)))])

    def _whole(self, batch: dict[str, Tensor]) -> Tensor | None:
        x = None if self._model.pre_process else self._receive(batch)
        with self._recording():
            return self._to_the_end(x, self._layers, batch)

    def _without(self, start: int, length: int, batch: dict[str, Tensor]) -> Tensor | None:
        if start >= self._end:
            return None
        x = self._states[start] if start >= self._begin else self._receive(batch)
        return self._to_the_end(x, self._layers[max(0, start + length - self._begin) :], batch)

    def _to_the_end(self, x: Tensor | None, layers: list[Module], batch: dict[str, Tensor]) -> Tensor | None:
        """From x through `layers` to the next stage or, on the last one, to the losses."""
        if layers or x is None or self._model.post_process:
            x = self._forward(x, layers, batch)
        if self._model.post_process:
            return (x.float() * batch["loss_mask"]).sum(1).double()
        assert self._relay is not None, "enter the context first"
        self._relay.send(x)
        return None

    def _forward(self, x: Tensor | None, layers: list[Module], batch: dict[str, Tensor]) -> Tensor:
        model, decoder = self._model, self._model.decoder
        all_layers, decoder.layers = decoder.layers, ModuleList(layers)
        try:
            if not model.pre_process:
                model.set_input_tensor(x)
                x = None
            # Often no attention mask: see `lm_loss`.
            mask = batch.get("attention_mask")
            return model(
                batch["tokens"], batch["position_ids"], mask, decoder_input=x, labels=batch["labels"]
            )
        finally:
            decoder.layers = all_layers

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Inside, a pass leaves the state at the input of each of the stage's layers in `_states`."""

        def keep(index: int) -> Callable[..., None]:
            def hook(layer: Module, args: Any, kwargs: dict[str, Any]) -> None:
                self._states[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        handles = [
            layer.register_forward_pre_hook(keep(index), with_kwargs=True)
            for index, layer in enumerate(self._layers, self._begin)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _receive(self, batch: dict[str, Tensor]) -> Tensor:
        assert self._relay is not None, "enter the context first"
        config, (b, s) = self._model.config, batch["tokens"].shape
        rows = s // parallel.tp_size() if config.sequence_parallel else s
        shape = rows, b, config.hidden_size
        return self._relay.receive(
            torch.empty(shape, dtype=config.pipeline_dtype, device=batch["tokens"].device)
        )


def _known(losses: Tensor | None) -> Tensor:
    assert losses is not None, "the last stage takes part in every pass"
    return losses


def lm_loss_without(
    chunks: Sequence[Any],
    dataset: Any,
    samples: int,
    blocks: Sequence[Block],
    *,
    micro_batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean next-token cross-entropy of the whole model and without each block, over the first `samples` samples.

    Args:
        chunks, dataset, samples, micro_batch_size, progress: as for `lm_loss`.
        blocks: what to leave out, one at a time.

    Returns:
        Float64 [1 + blocks], in nats, on the CPU, the same on every rank.

    Raises:
        InputError: as `LayerRemoval`.
    """
    assert samples <= len(dataset)
    device = next(chunks[0].parameters()).device
    totals = torch.zeros(2 + len(blocks), dtype=torch.float64, device=device)
    mine = range(parallel.dp_rank(), samples, parallel.dp_size())
    with evaluating(chunks), LayerRemoval(chunks, blocks) as removal:
        for begin in range(0, len(mine), micro_batch_size):
            indices = mine[begin : begin + micro_batch_size]
            batch = stacked([dataset[i] for i in indices], device)
            if (losses := removal.losses(batch)) is not None:
                totals += torch.cat([losses.sum(1), batch["loss_mask"].double().sum()[None]])
            if progress is not None:
                progress(begin + len(indices))
    totals = merged(totals).cpu()
    return totals[:-1] / totals[-1]


def merged(losses: Tensor) -> Tensor:
    """Sums (of the last stage; zeros elsewhere) over the data-parallel ranks, the same on every rank."""
    parallel.broadcast_pp(losses, parallel.pp_size() - 1)
    parallel.all_reduce(losses, "dp")
    # All tensor-parallel ranks take one's, so that rounding cannot make plans differ between ranks.
    return parallel.all_gather_tp(losses)[0]
