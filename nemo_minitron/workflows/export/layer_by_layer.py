"""Logits of a NeMo 2 checkpoint with one layer in memory: a Megatron-core model of one layer, loaded anew for each.

The layer is told which of the checkpoint's it stands for, and Megatron-core's sharded state dict says then which slices
of which tensors belong into its parameters. (Its own loading wants every layer's in one process, 0.13.1.)
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.export.distributed_reader import DistributedReader
from nemo_minitron.nemo import models, trainer
from nemo_minitron.nemo.session import nemo_tokenizer


def logits(
    source: Source,
    reader: DistributedReader,
    tokens: Tensor,
    *,
    vocab_rows: int,
    rounded: Callable[[Tensor], Tensor] = lambda weight: weight,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """What Megatron-core's forward pass gives, computed in float32 in one process.

    Args:
        source: of kind "nemo".
        reader: of its weights.
        tokens: int64 [b, s].
        vocab_rows: of the stored embeddings, those that pad the vocabulary included.
        rounded: what becomes of each weight, float32 [..., in], when it is written.
        progress: told how many layers are done.

    Returns:
        float32 [b, s, vocab_rows].
    """
    module = _one_layer(source, vocab_rows)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    kept: list[Tensor] = []
    layer = module.decoder.layers[0]
    # A layer gives its output, [s, b, h], and a context that decoders do not have.
    layer.register_forward_hook(lambda *called: kept.append(called[2][0]))
    hidden, layers = None, source.architecture.num_layers
    with torch.inference_mode():
        for number in range(layers):
            _load(module, reader, number, layers, rounded)
            module.post_process = number == layers - 1
            out = module(tokens, positions, None, decoder_input=hidden)
            hidden = kept.pop()
            progress(number + 1)
    return out.float()


def _one_layer(source: Source, vocab_rows: int) -> Any:
    """Megatron's GPTModel of the family with one layer, its weights not yet set."""
    arch = source.architecture.replace(num_layers=1, vocab_size=vocab_rows)
    model = models.to_model(
        models.to_config(arch, seq_length=source.seq_length), nemo_tokenizer(source.tokenizer)
    )
    made = trainer.trainer(TrainerConfig(), training=False)
    made.strategy.connect(model)
    model.trainer = made
    made.strategy.setup_environment()
    model.configure_model()
    return model.module.eval()


def _load(
    module: Any, reader: DistributedReader, number: int, layers: int, rounded: Callable[[Tensor], Tensor]
) -> None:
    """Fill the layer with the checkpoint's of that number and, the first time, what stands beside the layers."""
    config, layer = module.decoder.config, module.decoder.layers[0]
    config.num_layers, layer.layer_number = layers, number + 1
    try:
        wanted = module.sharded_state_dict(prefix="module.")
    finally:
        config.num_layers, layer.layer_number = 1, 1
    if number:
        wanted = {key: value for key, value in wanted.items() if ".layers." in key}
    apply_factories(wanted)
    for tensor in nested_values(wanted):
        if isinstance(tensor, ShardedTensor):
            size = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
            found = reader.read(tensor.key, tuple(tensor.global_offset), size)
            # The module's own parameter, or the half of it that has this key.
            tensor.data.copy_(rounded(found.view(tensor.data.shape).float()))
