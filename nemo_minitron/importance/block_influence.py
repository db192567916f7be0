"""Scores of layers and of contiguous blocks by how much they turn the residual stream."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nemo_minitron import parallel
from nemo_minitron.errors import InputError
from nemo_minitron.megatron_gpt import decoder_of, layers_of
from nemo_minitron.parallel import GroupName

METRICS = ("block_influence", "angular_distance")
# A residual state and its Euclidean norm at each token.
_State = tuple[Tensor, Tensor]


class BlockInfluenceCollector:
    """Compares each token's residual state before and after a block of layers.

    For the block of n layers that starts at layer i, with states x[i] before and x[i+n] after it:

    * block_influence: 1 - cos(x[i], x[i+n]) (arXiv 2407.14679, section 2.2, after arXiv 2403.03853);
    * angular_distance: arccos(cos(x[i], x[i+n])) / pi (arXiv 2403.17887, there of each sequence's last
    token),

    each the mean over all tokens, the cosine in float32. Used like `ImportanceCollector`, and in the same
    passes when nested with one. It keeps as many residual states as the longest block has layers; a
    pipeline stage hands those that longer blocks need to the next one.

    Args:
        model_chunks: the rank's GPTModel, or several with virtual pipeline stages; wrappers are looked
            through.
        lengths: block lengths in layers; 1 gives the layers' own scores.

    Raises:
        InputError: a length below 1 or above the number of layers; blocks of several layers with virtual
            stages or with a stage that holds no layer.
    """

    def __init__(self, model_chunks: Sequence[Module], lengths: Sequence[int] = (1,)) -> None:
        self._decoders = [decoder_of(chunk) for chunk in model_chunks]
        self._config = self._decoders[0].config
        self.lengths = tuple(sorted(set(lengths)))
        self._longest = max(self.lengths, default=0)
        self._check_lengths()
        # [lengths, metrics, first layer of the block]: sums over the rank's tokens.
        shape = len(self.lengths), len(METRICS), self._config.num_layers
        device = next(self._decoders[0].parameters(), torch.empty(0)).device
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = 0
        # Recent residual states by the index of the layer that reads them.
        self._window: dict[int, _State] = {}
        # Activation recomputation runs layers again in the backward pass, when nothing may be counted.
        self._is_open = False
        self._relay = parallel.PipelineRelay() if self._longest > 1 else None
        self._handles: list[Any] = []

    def _check_lengths(self) -> None:
        layers = self._config.num_layers
        for length in self.lengths or (0,):
            if not 1 <= length <= layers:
                raise InputError(
                    f"block length {length}: must be between 1 and {layers}, the number of layers"
                )
        if self._longest > 1 and len(self._decoders) > 1:
            raise InputError(f"block length {self._longest}: only 1 is possible with virtual pipeline stages")
        if self._longest > 1 and 0 in parallel.gather_over_pp(len(self._decoders[0].layers)):
            raise InputError(f"block length {self._longest}: only 1 is possible with a stage without layers")

    def __enter__(self) -> "BlockInfluenceCollector":
        for number, decoder in enumerate(self._decoders):
            layers = list(layers_of(decoder))
            self._handles.append(decoder.register_forward_pre_hook(self._open))
            if layers:
                index, first = layers[0]
                self._handles.append(first.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            for index, layer in layers:
                self._handles.append(layer.register_forward_hook(self._leave(index)))
            self._handles.append(decoder.register_forward_hook(self._closer(counts=number == 0)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._window.clear()

    def _open(self, *_: Any) -> None:
        self._is_open = True

    def _enter(self, index: int) -> Callable[..., None]:
        """A hook for the input of the first layer that a chunk holds."""

        @torch.no_grad()
        def hook(layer: Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._is_open:
                x = args[0] if args else kwargs["hidden_states"]
                self._window.clear()
                self._receive_window(index, x)
                self._window[index] = _state(x)

        return hook

    def _leave(self, index: int) -> Callable[..., None]:
        """A hook for the output of layer `index`."""

        @torch.no_grad()
        def hook(layer: Module, args: Any, output: Any) -> None:
            if not self._is_open:
                return
            after, end = _state(output[0] if isinstance(output, tuple) else output), index + 1
            for k, length in enumerate(self.lengths):
                if (before := self._window.get(end - length)) is not None:
                    self._sums[k, :, end - length] += _distances(before, after)
            self._window[end] = after
            self._window.pop(end - self._longest, None)

        return hook

    def _closer(self, counts: bool) -> Callable[..., None]:
        def close(decoder: Module, args: Any, output: Tensor) -> None:
            self._is_open = False
            if counts:
                self._tokens += output.shape[0] * output.shape[1]
            self._send_window()
            self._window.clear()

        return close

    def _receive_window(self, index: int, like: Tensor) -> None:
        """The states before `index` that blocks reaching into this stage start from; `like` is the one at
        it."""
        count = min(self._longest - 1, index)
        if self._relay is not None and parallel.pp_rank() > 0 and count:
            buffer = like.new_empty(count, *like.shape)
            for k, x in enumerate(self._relay.receive(buffer)):
                self._window[index - count + k] = _state(x)

    def _send_window(self) -> None:
        states = [x for x, _ in self._window.values()][:-1]  # the schedule itself hands over the last one
        if self._relay is not None and parallel.pp_rank() < parallel.pp_size() - 1 and states:
            self._relay.send(torch.stack(states))

    def finish(self) -> dict[str, Tensor]:
        """Merge over all ranks; to be called once, by all of them.

        Returns:
            "layers/<metric>" [num_layers] and, for lengths n > 1, "blocks/<metric>/<n>" [num_layers - n +
            1], the same on every rank, float32, on the CPU, for both metrics.

        Raises:
            InputError: NaN or infinity in the residual stream (names the first such layer); no samples.
        """
        if self._relay is not None:
            self._relay.close()
        tokens = torch.tensor(self._tokens, device=self._sums.device)
        groups: tuple[GroupName, ...] = ("dp", "cp", "tp") if self._config.sequence_parallel else ("dp", "cp")
        for group in groups:
            parallel.all_reduce(self._sums, group)
            parallel.all_reduce(tokens, group)
        if not int(tokens):
            raise InputError("calibration: there was no sample")
        sums = parallel.all_reduce(self._sums, "pp")
        # All tensor-parallel ranks take one's, so that rounding cannot make plans differ between ranks.
        means = parallel.all_gather_tp(sums / int(tokens))[0].cpu()
        self._check_finite(means)
        scores = {}
        for k, length in enumerate(self.lengths):
            for metric, values in zip(METRICS, means[k], strict=True):
                name = f"layers/{metric}" if length == 1 else f"blocks/{metric}/{length}"
                scores[name] = values[: self._config.num_layers - length + 1].float()
        return scores

    def _check_finite(self, means: Tensor) -> None:
        # The shortest blocks name the place best.
        bad = (~means[0].isfinite().all(dim=0)).nonzero()
        if len(bad):
            first, last = int(bad[0]), int(bad[0]) + self.lengths[0] - 1
            raise InputError(
                "NaN or infinity in the residual stream: from the input of layer "
                f"{first} to the output of layer {last}"
            )


def _state(x: Tensor) -> _State:
    return x, torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _distances(before: _State, after: _State) -> Tensor:
    """Float64 [metrics], summed over tokens; a state of norm 0 counts as orthogonal to all."""
    norms = (before[1] * after[1]).clamp_min(torch.finfo(torch.float32).tiny)
    cosine = (torch.linalg.vecdot(before[0].float(), after[0].float()) / norms).clamp(-1, 1)
    return torch.stack(((1 - cosine).double().sum(), cosine.arccos().double().sum() / math.pi))
