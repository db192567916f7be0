"""A Megatron-core model of one layer that stands for each layer of a model in turn, loaded anew for each.

The layer is told which of the model's it stands for, and Megatron-core's sharded state dict says then which slices of
which tensors belong into its parameters. (Its own loading wants every layer's in one process, 0.13.1.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor
from torch.nn import ModuleList

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.megatron_gpt import give_hidden_states, output_weight
from nemo_minitron.nemo import models, trainer
from nemo_minitron.nemo.session import nemo_tokenizer


class Reader(Protocol):
    """Tensors of a checkpoint by Megatron-core's names."""

    def read(self, key: str, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A box of a tensor; the first axis of a layer's is the layer's number."""


class OneLayer:
    """Megatron's GPTModel of a family with one layer, its embeddings and its output layer; in one process.

    Args:
        source: whose architecture and tokenizer it has.
        reader: of its weights.
        vocab_rows: of the embeddings, those that pad the vocabulary included.
        precision: as `trainer.precision`.
        rounded: what becomes of each weight, float32 [..., in], before it is used; None: it is taken as it is.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        *,
        vocab_rows: int,
        precision: str = "32",
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.layers = source.architecture.num_layers
        self._reader, self._rounded = reader, rounded
        arch = source.architecture.replace(num_layers=1, vocab_size=vocab_rows)
        tokenizer = nemo_tokenizer(source.tokenizer)
        self.module = built(arch, source.seq_length, tokenizer, precision, drawn=False).eval()
        self._states: list[Tensor] = []
        # What the final norm is given, [s, b, h], is the layer's output, or its input where the layer is left out.
        self.module.decoder.final_layernorm.register_forward_pre_hook(
            lambda module, given: self._states.append(given[0])
        )
        give_hidden_states(self.module)

    @contextmanager
    def as_layer(self, number: int) -> Iterator[Any]:
        """Within it, the model's layer has the number and the weights of one of the source's; gives the GPTModel."""
        config, layer = self.module.decoder.config, self.module.decoder.layers[0]
        config.num_layers, layer.layer_number = self.layers, number + 1
        try:
            self._load(number)
            yield self.module
        finally:
            config.num_layers, layer.layer_number = 1, 1

    def forward(
        self, batch: dict[str, Tensor], state: Tensor | None, *, without: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One layer's pass over a microbatch.

        Args:
            batch: `tokens`, `position_ids` int64 [b, s], perhaps `attention_mask`.
            state: the residual states before the layer [s, b, h]; None: the embeddings of the tokens.
            without: leave the layer out.

        Returns:
            The residual states after it, and these after the final norm, both [s, b, h].
        """
        mask, decoder = batch.get("attention_mask"), self.module.decoder
        layers = decoder.layers
        decoder.layers = ModuleList() if without else layers
        try:
            normed = self.module(batch["tokens"], batch["position_ids"], mask, decoder_input=state)
        finally:
            decoder.layers = layers
        return self._states.pop(), normed

    def logits(self, normed: Tensor) -> Tensor:
        """Float32 [b, s, vocab_rows] of final hidden states [s, b, h], by Megatron's output layer."""
        shared = self.module.share_embeddings_and_output_weights
        weight = output_weight(self.module) if shared else None
        return self.module.output_layer(normed, weight=weight)[0].transpose(0, 1).float()

    def _load(self, number: int) -> None:
        """Fill the layer and, the first time, what stands beside the layers."""
        wanted = self.module.sharded_state_dict(prefix="module.")
        if number and self._beside_is_loaded:
            wanted = {key: value for key, value in wanted.items() if ".layers." in key}
        self._beside_is_loaded = True
        apply_factories(wanted)
        for tensor in nested_values(wanted):
            if isinstance(tensor, ShardedTensor):
                size = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
                # The shape counts: a norm's vector is not rounded as a matrix of one row is.
                found = self._reader.read(tensor.key, tuple(tensor.global_offset), size).view(
                    tensor.data.shape
                )
                if self._rounded is not None:
                    found = self._rounded(found.float())
                # The module's own parameter, or the half of it that has this key.
                with torch.no_grad():
                    tensor.data.copy_(found)

    _beside_is_loaded = False


def built(
    arch: Architecture,
    seq_length: int,
    tokenizer: Any = None,
    precision: str = "32",
    *,
    drawn: bool = True,
) -> Any:
    """Megatron's GPTModel of these sizes in one process, its weights not those of any checkpoint.

    Args:
        tokenizer: NeMo's; None for a model that reads no text.
        precision: as `trainer.precision`.
        drawn: whether the weights are random; False: they are anything. Megatron draws whole tables in float32.
    """
    config = models.to_config(arch, seq_length=seq_length, precision=precision)
    config.perform_initialization = drawn
    model = models.to_model(config, tokenizer)
    made = trainer.trainer(TrainerConfig(precision=precision), training=False)
    made.strategy.connect(model)
    model.trainer = made
    made.strategy.setup_environment()
    model.configure_model()
    if precision.startswith("bf16"):
        # NeMo leaves it to Megatron's wrapper (megatron/core/transformer/module.py@0.13.1, Float16Module).
        model.module.bfloat16()
    return model.module
