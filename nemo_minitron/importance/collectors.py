"""Scores of the width axes, collected by forward hooks while a (sharded) Megatron GPT reads calibration
data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nemo_minitron import parallel
from nemo_minitron.axes import AXES, BY_NAME, WIDTH_AXES
from nemo_minitron.errors import InputError
from nemo_minitron.importance.aggregation import (
    BatchMoments,
    Statistic,
    check_statistic,
    sequence_moments,
    sequence_statistic,
)
from nemo_minitron.importance.hook_points import KINDS, PLACES, Site, describe
from nemo_minitron.megatron_gpt import decoder_of
from nemo_minitron.parallel import GroupName


class ImportanceCollector:
    """Scores units by their activations (arXiv 2407.14679, section 2.2), under any parallel layout.

    A context manager: hooks are attached inside it, any number of forward passes may run (Megatron's
    forward-only schedules included; each pass of a chunk counts its samples), then `finish` merges over
    ranks:

        with ImportanceCollector([model]) as collector:
            ...  # model.eval(); forward passes under torch.no_grad()
        scores = collector.finish()

    Where ModelOpt's `mcore_minitron` (nvidia-modelopt@0.47.0) differs: it leaves the final norm out
    (`include_final_norm=False` does so here), takes a head's norm over its channels after aggregating each
    channel where this, like the paper, takes it at each token before, and knows (l2, mean) only.

    Args:
        model_chunks: the rank's GPTModel, or several with virtual pipeline stages; wrappers are looked
            through.
        axes: which of `axes.WIDTH_AXES` to score.
        batch: statistic over samples, "mean", "l2" or "var".
        sequence: statistic over a sample's tokens, likewise.
        include_final_norm: whether the norm before the output layer counts towards "hidden_size".

    Attributes:
        samples: sequences seen; by this rank, after `finish` over all data-parallel ranks.
        tokens: tokens seen, likewise; each counts once, also where a sequence is spread over ranks.

    Raises:
        InputError: an unknown axis or statistic; a model that is no dense Megatron GPT.
    """

    def __init__(
        self,
        model_chunks: Sequence[Module],
        axes: Sequence[str] = WIDTH_AXES,
        batch: Statistic = "l2",
        sequence: Statistic = "mean",
        include_final_norm: bool = True,
    ) -> None:
        if not axes or set(axes) - set(WIDTH_AXES):
            raise InputError(f"axes={list(axes)}: must be some of {', '.join(WIDTH_AXES)}")
        check_statistic("batch aggregation", batch)
        check_statistic("sequence aggregation", sequence)
        self.axes = tuple(axes)
        self.samples = self.tokens = 0
        self._decoders = [decoder_of(chunk) for chunk in model_chunks]
        self._config = self._decoders[0].config
        self._tracks: list[dict[str, _Track]] = []
        for decoder in self._decoders:
            sites = self._sites(decoder, include_final_norm)
            self._tracks.append({k: _Track(s, batch, sequence, self._groups(k)) for k, s in sites.items()})
        self._handles: list[Any] = []

    def _sites(self, decoder: Any, include_final_norm: bool) -> dict[str, list[Site]]:
        kinds = {axis.hooks for axis in AXES if axis.name in self.axes}
        return {name: KINDS[name].sites(decoder, include_final_norm) for name in sorted(kinds)}

    def _groups(self, kind: str) -> tuple[GroupName, ...]:
        """Over which ranks the tokens of a sequence are spread where these sites are."""
        spread = KINDS[kind].spread_by_sequence_parallel and self._config.sequence_parallel
        return ("tp", "cp") if spread else ("cp",)

    def __enter__(self) -> "ImportanceCollector":
        for number, (decoder, tracks) in enumerate(zip(self._decoders, self._tracks, strict=True)):
            self._handles.append(decoder.register_forward_pre_hook(self._opener(tracks)))
            for track in tracks.values():
                self._handles += track.attach()
            self._handles.append(decoder.register_forward_hook(self._closer(tracks, counts=number == 0)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @staticmethod
    def _opener(tracks: dict[str, "_Track"]) -> Callable[..., None]:
        def open_tracks(*_: Any) -> None:
            for track in tracks.values():
                track.open()

        return open_tracks

    def _closer(self, tracks: dict[str, "_Track"], counts: bool) -> Callable[..., None]:
        def close_tracks(decoder: Module, args: Any, output: Tensor) -> None:
            for track in tracks.values():
                track.close()
            if counts:
                shards = parallel.cp_size() * (parallel.tp_size() if self._config.sequence_parallel else 1)
                self.samples += output.shape[1]
                self.tokens += output.shape[0] * output.shape[1] * shards

        return close_tracks

    def finish(self) -> dict[str, Tensor]:
        """Merge over all ranks; to be called once, by all of them.

        Returns:
            Axis to scores, the same on every rank: global, float32, on the CPU, shaped as in
            `Scores.tensors`. A query group's is the sum of its heads', a channel's the sum over the norms.

        Raises:
            InputError: NaN or infinity in the activations (names the first such place in the network); a
                data-parallel rank without samples.
        """
        tables = {kind: self._table(kind) for kind in self._tracks[0]}
        self._check_finite(tables)
        for name in ("samples", "tokens"):
            total = torch.tensor(getattr(self, name), device=self._device())
            setattr(self, name, int(parallel.all_reduce(total, "dp")))
        return {axis: self._scores(axis, tables).to("cpu", torch.float32) for axis in self.axes}

    def _table(self, kind: str) -> Tensor:
        """Float64 [rows of all stages, the rank's own units]."""
        axis = BY_NAME[KINDS[kind].axis]
        units = axis.size(self._config) // (parallel.tp_size() if axis.sharded else 1)
        rows = len(KINDS[kind].positions(self._config.num_layers))
        table = torch.zeros(rows, units, dtype=torch.float64, device=self._device())
        for tracks in self._tracks:
            if sites := tracks[kind].sites:  # a stage may hold no layer
                table[[site.row for site in sites]] = tracks[kind].result()
        return parallel.all_reduce(table, "pp")

    def _check_finite(self, tables: dict[str, Tensor]) -> None:
        layers, nowhere = self._config.num_layers, len(PLACES) * self._config.num_layers + 1
        first = nowhere
        for kind, table in tables.items():
            good, positions = table.isfinite().all(dim=1).tolist(), KINDS[kind].positions(layers)
            first = min([first, *(p for p, g in zip(positions, good, strict=True) if not g)])
        # The other tensor-parallel ranks hold other units.
        first = int(parallel.all_reduce(torch.tensor(first, device=self._device()), "tp", "min"))
        if first != nowhere:
            raise InputError(f"NaN or infinity in the activations: {describe(first, layers)}")

    def _scores(self, name: str, tables: dict[str, Tensor]) -> Tensor:
        axis = BY_NAME[name]
        parts = parallel.all_gather_tp(tables[axis.hooks])
        if not axis.sharded:
            # Every rank has computed all units; all take one rank's, so that rounding cannot make plans differ.
            return parts[0].sum(0)
        # One for each measured unit, or their sum where the axis counts what holds several of them.
        return torch.cat(parts, dim=1).unflatten(1, (axis.size(self._config), -1)).sum(-1)

    def _device(self) -> torch.device:
        return next(self._decoders[0].parameters(), torch.empty(0)).device


class _Track:
    """The sites of one kind in one model chunk: a pass leaves moments, closing it turns them into statistics.

    The work across ranks is done once a pass, for all sites together.
    """

    def __init__(
        self, sites: list[Site], batch: Statistic, sequence: Statistic, groups: Sequence[GroupName]
    ) -> None:
        self.sites = sites
        self._statistic, self._groups = sequence, groups
        self._batch = BatchMoments(batch)
        self._moments: list[Tensor | None] = []
        self._tokens = 0
        # Activation recomputation runs modules again in the backward pass, when nothing may be counted.
        self._is_open = False

    def attach(self) -> list[Any]:
        return [self._attach(number, site) for number, site in enumerate(self.sites)]

    def _attach(self, number: int, site: Site) -> Any:
        @torch.no_grad()
        def see(x: Tensor) -> None:
            if self._is_open:
                units = site.units(x)
                self._moments[number] = sequence_moments(units, self._statistic)
                self._tokens = units.shape[0]

        if site.at_output:
            return site.module.register_forward_hook(lambda module, args, output: see(output))
        return site.module.register_forward_pre_hook(lambda module, args: see(args[0]))

    def open(self) -> None:
        self._moments = [None] * len(self.sites)
        self._is_open = True

    def close(self) -> None:
        self._is_open = False
        moments = [m for m in self._moments if m is not None]
        assert len(moments) == len(self.sites), "a hooked module did not run"
        if moments:
            y = sequence_statistic(torch.stack(moments), self._tokens, self._statistic, self._groups)
            self._batch.add(y)
        self._moments = []

    def result(self) -> Tensor:
        """Float64 [sites, units], over all data-parallel ranks."""
        self._batch.merge("dp")
        return self._batch.result()
