"""Toy architectures of the model families that pruning has to know, and a probe for memory."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_minitron.arch import Architecture

LLAMA = Architecture(4, 32, 48, 8, 4, 8, 64, add_qkv_bias=False)
FAMILIES = {
    "llama": LLAMA,
    "llama-tied": LLAMA.replace(share_embeddings_and_output_weights=True),
    "mistral-narrow-heads": LLAMA.replace(kv_channels=6, hidden_size=40),
    "qwen2": LLAMA.replace(add_qkv_bias=True, share_embeddings_and_output_weights=True),
    "qwen3": LLAMA.replace(qk_layernorm=True, kv_channels=12),
    "gemma": LLAMA.replace(
        kv_channels=16,
        share_embeddings_and_output_weights=True,
        activation="gelu_tanh",
        layernorm_zero_centered_gamma=True,
    ),
    "nemotron": LLAMA.replace(
        gated_linear_unit=False,
        activation="squared_relu",
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        rotary_percent=0.5,
    ),
    "gpt": Architecture(
        4,
        32,
        48,
        4,
        4,
        8,
        64,
        gated_linear_unit=False,
        normalization="LayerNorm",
        add_bias_linear=True,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
        max_position_embeddings=16,
        activation="gelu",
    ),
}


class LiveBytes(TorchDispatchMode):
    """Inside, `peak` is the most memory (bytes) that tensors held at once; `modules` count from the start."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._count(tensor)
        self.start = self.now

    def _count(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._count(leaf)
        return result
