"""What `recipes/merge.py` refuses before anything is written."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.families import FAMILIES
from nemo_minitron.checkpoints.source import CHECKPOINT, Source, find_source
from nemo_minitron.config.merge import MergeConfig, MergeRecipe
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.export import huggingface
from nemo_minitron.export.card import licence_of
from nemo_minitron.export.licences import Licence
from nemo_minitron.export.lineage import Lineage, lineage
from nemo_minitron.export.target import bytes_of, check_target
from nemo_minitron.export.tensors import parts
from nemo_minitron.merging import mergekit_file
from nemo_minitron.merging.models import Merged, Read, Tensors, check_finite, opened
from nemo_minitron.merging.path import Laid, folds, read_path
from nemo_minitron.merging.settings import PATH, Merge, Setting, check_models, number
from nemo_minitron.progress import end_if_asked, open_bar
from nemo_minitron.workflows.one_process import OneProcess, check_one_process


@dataclass(frozen=True)
class Prepared(OneProcess):
    """The models, checked and open.

    Attributes:
        merge: what to do with them.
        sources: the base first, where there is one; `named`: what messages call each; `readers`: its tensors.
        sha256: of each.
        dtype: that is written.
        tokenizer: a Hugging Face directory.
        lineages: of each source.
    """

    merge: Merge
    sources: list[Source]
    named: list[str]
    readers: list[Read]
    sha256: list[str]
    dtype: torch.dtype
    tokenizer: Path
    target: Path
    shard_bytes: int
    lineages: list[Lineage]
    licence: Licence | None

    @property
    def seq_length(self) -> int:
        """The longest that all models take."""
        return min(source.seq_length for source in self.sources)


def check(r: MergeRecipe) -> Prepared:
    """Refuse what cannot be merged; all tensors are read once.

    Raises:
        InputError: names the value.
    """
    check_one_process(r.trainer, "merge", ", whatever layout the models had")
    return prepare(r, merge_of(r))


def prepare(r: MergeRecipe, merge: Merge, ready: dict[str, Any] | None = None) -> Prepared:
    """Open the models of a merge and hold everything against them.

    Args:
        ready: what a launcher's check has found: the models' hashes; their values are then not read again.

    Raises:
        InputError: names the value.
    """
    shard_bytes = bytes_of("merge.shard_size", r.merge.shard_size)
    named = names_of(r, merge)
    sources = [
        find_source(path, name.removesuffix(f"={path}"), r.data)
        for path, name in zip(merge.paths, named, strict=True)
    ]
    check_alike(sources, named, depth=merge.method != PATH)
    _check_layers(r, merge, sources)
    lineages = [lineage(path) for path in merge.paths]
    licence = _licence(r, lineages, named)
    readers = [opened(source, name) for source, name in zip(sources, named, strict=True)]
    merged = tensors_of(merge, sources, readers)
    tokenizer = _tokenizer(merge, sources)
    huggingface.generation_settings(tokenizer, merged.architecture.vocab_size)
    dtype = huggingface.DTYPES[sources[0].dtype if merge.dtype == huggingface.SOURCE_DTYPE else merge.dtype]
    target = _target(r, merge, merged.architecture.parameters() * dtype.itemsize)
    if ready is None:
        check_weights(sources, readers, named)
    sha256 = ready["models_sha256"] if ready else [source.sha256() for source in sources]
    return Prepared(
        merge, sources, named, readers, sha256, dtype, tokenizer, target, shard_bytes, lineages, licence
    )


def merge_of(r: MergeRecipe) -> Merge:
    """The merge that the configuration, or its file, describes.

    Raises:
        InputError: models and a file, or neither; numbers that do not fit the models; a method without its base.
    """
    c = r.merge
    if c.file is None:
        merge = of_config(c, r.models, r.base, r.seed)
    elif r.models or r.base is not None:
        raise InputError(f"merge.file={c.file}: says which models are merged; leave models and base out")
    else:
        merge = mergekit_file.read(c.file, r.seed)
    if c.path is not None and merge.method != PATH:
        raise InputError(f"merge.path={c.path}: is of merge.method=path; the method is {merge.method}")
    check_models(merge)
    if merge.tokenizer is not None and merge.tokenizer not in merge.paths:
        legal = ", ".join(dict.fromkeys(merge.paths))
        raise InputError(f"merge.tokenizer={merge.tokenizer}: must be one of the models, {legal}")
    return merge


def of_config(c: MergeConfig, models: list[str], base: str | None, seed: int) -> Merge:
    """The merge that a configuration without a file describes.

    Raises:
        InputError: null in the place of a number.
    """
    for name in ("weight", "density", "t"):
        if getattr(c, name) is None:
            raise InputError(f"merge.{name}=null: must be a finite number, or a list of them")
    return Merge(
        method=c.method,
        models=tuple(models),
        base=base,
        weights=_by_model(c.weight, len(models), c.spread),
        densities=_by_model(c.density, len(models), c.spread),
        t=_by_layer(c.t, c.spread),
        normalize=c.normalize,
        rescale=c.rescale,
        scale=c.scale,
        filter_wise=c.filter_wise,
        dtype=c.dtype,
        tokenizer=c.tokenizer,
        seed=seed,
        path=c.path,
    )


def _by_model(value: Any, models: int, spread: str) -> tuple[Setting, ...]:
    several = value if isinstance(value, list) else [value] * models
    return tuple(_by_layer(one, spread) for one in several)


def _by_layer(value: Any, spread: str) -> Setting:
    return number(*map(float, value if isinstance(value, list) else [value]), spread=spread)


def names_of(r: MergeRecipe, merge: Merge) -> list[str]:
    """What messages call each of `merge.paths`, such as `models[0]=DIR`."""
    if r.merge.file is not None:
        keys = [f"merge.file={r.merge.file}: model"] * len(merge.paths)
    else:
        keys = [f"models[{number}]" for number in range(len(merge.models))]
        keys = keys if merge.base is None else ["base", *keys]
    return [f"{key}={path}" for key, path in zip(keys, merge.paths, strict=True)]


def check_alike(sources: Sequence[Source], named: Sequence[str], *, depth: bool = True) -> None:
    """Whether all models have one architecture of a family, and one tokenizer.

    Args:
        depth: whether they must have the same number of layers.

    Raises:
        InputError: names the first that differs, and in what.
    """
    first, others = sources[0], list(zip(sources, named, strict=True))[1:]
    if first.architecture.model_type is None:
        raise InputError(f"{named[0]}: a plain GPTModel; merged are {', '.join(FAMILIES)}")
    wanted = dataclasses.asdict(first.architecture)
    for source, name in others:
        for field, value in dataclasses.asdict(source.architecture).items():
            if value != wanted[field] and (depth or field != "num_layers"):
                raise InputError(
                    f"{name}: {field} is {value}, of {named[0]} it is {wanted[field]}; models of one architecture are "
                    "merged"
                )
    own = load_tokenizer(first.tokenizer).get_vocab() if others else {}
    for source, name in others:
        # Pairs that only one of the two has: whichever has more tokens, the first that differs is found.
        if differing := own.items() ^ load_tokenizer(source.tokenizer).get_vocab().items():
            token, number = min(differing, key=lambda pair: (pair[1], pair[0]))
            raise InputError(
                f"{name}: its tokenizer is another than that of {named[0]}: token {number} ({token!r}) is not "
                "the same; models of one tokenizer are merged"
            )


def _check_layers(r: MergeRecipe, merge: Merge, sources: Sequence[Source]) -> None:
    layers = sources[0].architecture.num_layers
    if merge.layers not in (None, layers):
        raise InputError(
            f"merge.file={r.merge.file}: layer_range [0, {merge.layers}]: the models have {layers} layers"
        )


def tensors_of(merge: Merge, sources: Sequence[Source], readers: Sequence[Read]) -> Tensors:
    """The tensors of a merge of opened models, every number of it checked.

    Raises:
        InputError: a number is not legal, or a layer that no model has.
    """
    arch = sources[0].architecture
    if merge.method == PATH:
        path = read_path(str(merge.path), [source.architecture.num_layers for source in sources])
        return Laid(path, readers, arch, folded=folds(path))
    models = readers if merge.base is None else readers[1:]
    merged = Merged(arch, merge, readers[0] if merge.base is not None else None, models)
    merged.check()
    return merged


def check_weights(sources: Sequence[Source], readers: Sequence[Read], named: Sequence[str]) -> None:
    """Whether all values of all models are finite.

    Raises:
        InputError: they are not.
    """
    for source, reader, name in zip(sources, readers, named, strict=True):
        names = [part.name for part in parts(source.architecture)]
        with open_bar("read", len(names), "tensors") as bar:
            for tensor in names:
                end_if_asked()
                check_finite(reader.read(tensor), tensor, name)
                bar.update()


def _tokenizer(merge: Merge, sources: Sequence[Source]) -> Path:
    if merge.tokenizer is None:
        return sources[0].tokenizer
    return sources[merge.paths.index(merge.tokenizer)].tokenizer


def _target(r: MergeRecipe, merge: Merge, size: int) -> Path:
    if r.to is None:
        # The run is not finished, or it would have been refused: what lies there is a killed one's.
        to, overwrite = str(Path(r.run_dir) / CHECKPOINT), True
    else:
        to, overwrite = r.to, r.overwrite
    return check_target(to, *merge.paths, size=size, overwrite=overwrite)


def _licence(r: MergeRecipe, lineages: list[Lineage], named: list[str]) -> Licence | None:
    if r.license is not None:
        return licence_of(r.license, lineages[0])
    said = {
        found.licence: (found, name)
        for found, name in zip(lineages, named, strict=True)
        if found.licence is not None
    }
    if len(said) > 1:
        each = ", ".join(f"{name} {licence}" for licence, (_, name) in said.items())
        raise InputError(f"license: the models differ: {each}; say license=NAME, or license=none")
    return licence_of(None, next(iter(said.values()))[0]) if said else None
