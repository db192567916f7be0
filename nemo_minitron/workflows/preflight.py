"""What every recipe asks of a checkpoint before it is opened."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.checkpoints.any_family import AnyModel
from nemo_minitron.checkpoints.gguf import is_gguf
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config import by_size
from nemo_minitron.config.recipes import DataConfig, OptimConfig, cache_dir
from nemo_minitron.config.trainer import TrainerConfig, check_stages, check_tensor_ranks
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.data.tokenizer import is_trained_here, load_tokenizer
from nemo_minitron.environment import rank
from nemo_minitron.errors import InputError
from nemo_minitron.files import user_path

logger = logging.getLogger("nemo_minitron")
# Below a run directory: what `layer_stream.LayerStream` keeps until the run is done.
STATES = ".states"


def check_source(key: str, source: Source, t: TrainerConfig, seq_length: int) -> None:
    """Refuse a checkpoint that the layout or the samples do not fit.

    Args:
        key: what the configuration calls it, such as "source".
        source: the checkpoint.
        t: the layout.
        seq_length: of the samples, in tokens.

    Raises:
        InputError: names the setting, its value and the size that it does not fit.
    """
    arch = source.architecture
    if seq_length > source.seq_length:
        raise InputError(f"data.seq_length={seq_length}: the {key} was made for {source.seq_length} tokens")
    shared = {f"the {key}'s {axis}": getattr(arch, axis) for axis in ("num_query_groups", "ffn_hidden_size")}
    check_tensor_ranks("trainer.tensor_model_parallel_size", t.tensor_model_parallel_size, shared)
    check_stages(t, arch.num_layers, f"the {key}'s num_layers")


def check_streamed(t: TrainerConfig) -> None:
    """Refuse ranks, where a model goes through one process a layer at a time.

    Raises:
        InputError: there are several.
    """
    if t.ranks > 1:
        raise InputError(
            f"stream=true: works in one process, but the layout has {t.ranks} ranks; leave trainer.*_parallel_size at 1"
        )


def huggingface_source(path: str | Path, key: str, data: DataConfig) -> Source:
    """The checkpoint that is streamed.

    Args:
        path, key, data: as of `find_source`.

    Raises:
        InputError: of another form than a Hugging Face directory; as `find_source`.
    """
    reads = f"{key}={path}: stream=true reads a Hugging Face directory"
    if is_gguf(user_path(path)):
        raise InputError(f"{reads}, this is a GGUF file")
    source = find_source(path, key, data)
    if source.kind != "huggingface":
        raise InputError(
            f"{reads}, this is a NeMo 2 checkpoint; make one of it with python recipes/export.py"
        )
    return source


def check_vocabulary(source: Source | AnyModel, data: PreparedData, *, trained: bool = True) -> None:
    """Refuse data of a tokenizer whose ids are not the model's: no rows for them, or rows of other tokens.

    Args:
        source: the model.
        data: what it reads.
        trained: whether its weights know its own tokenizer.

    Raises:
        InputError: names both sizes, or the first id that stands for something else.
    """
    rows = source.vocab_size if isinstance(source, AnyModel) else source.architecture.vocab_size
    if data.indexed.vocab_size > rows:
        raise InputError(
            f"data.tokenizer has {data.indexed.vocab_size} entries, the model's vocabulary {rows}"
        )
    if not trained or source.tokenizer == Path(data.tokenizer_dir):
        return
    own = {number: token for token, number in load_tokenizer(source.tokenizer).get_vocab().items()}
    found = ((number, token) for token, number in data.tokenizer.get_vocab().items())
    if differing := [(number, token) for number, token in found if own.get(number, token) != token]:
        number, token = min(differing)
        raise InputError(
            f"data.tokenizer={data.tokenizer_dir}: id {number} is {token!r}, for the model {own[number]!r}; must have "
            "the model's ids"
        )


def say_corpus(d: DataConfig, data: PreparedData, *, prepared: bool, what: str) -> None:
    """One line where a foreign model meets the default corpus, which is Python's source code.

    A model whose tokenizer was trained here has read that corpus or one of its user's choice.

    Args:
        prepared: whether a launcher's check has said it.
        what: the recipe does on the corpus, such as "calibrates".
    """
    if d.name == "stdlib" and not prepared and rank() == 0 and not is_trained_here(data.tokenizer):
        logger.warning("data=stdlib %s on Python code; for other text say data=files data.train=FILES", what)


def say_repeats(d: DataConfig, data: PreparedData, tokens: float, *, prepared: bool) -> None:
    """One line where a budget or a blend draws more tokens than there are, so that texts are read several times.

    Args:
        tokens: drawn from the train split.
        prepared: whether a launcher's check has said it.
    """
    if prepared or rank() != 0 or (d.tokens is None and d.blend is None):
        return
    passes = data.indexed.passes("train", int(tokens))
    if repeated := [f"{name} {count:.2f} times" for name, count in passes.items() if count > 1]:
        logger.warning(
            "data: %s tokens are more than the data has without repeats: it is read on: %s",
            f"{int(tokens):,}",
            ", ".join(repeated),
        )


def settle_rates(o: OptimConfig, key: str, parameters: int, steps: int, *, prepared: bool) -> None:
    """`config.by_size.settle` for a model that learns, with a line about it where it is larger than the demo's.

    Args:
        prepared: whether a launcher's check has said it.

    Raises:
        InputError: as `settle`.
    """
    chosen = by_size.settle(o, key, parameters, steps)
    if chosen and not prepared and rank() == 0 and not by_size.is_small(parameters):
        logger.warning("%s", chosen)


def converted(source: Source, d: DataConfig) -> Source:
    """The NeMo 2 form of a checkpoint: Hugging Face directories are converted once, before ranks start, into
    the cache."""
    from nemo_minitron.nemo.huggingface import import_checkpoint  # NeMo, only where there is a conversion

    if source.kind == "nemo":
        return source
    found = find_source(import_checkpoint(source, cache_dir(d, "checkpoints")))
    assert found.architecture == source.architecture, "NeMo's importer changed the architecture"
    return found


def check_room(key: str, place: Path, needs: Mapping[str, int], there: int = 0) -> None:
    """Refuse work whose files its disk cannot hold.

    Args:
        key: the setting that names `place`, a directory that may not be there yet.
        needs: bytes, by what needs them.
        there: bytes of an earlier run that count as room: they are used or replaced.

    Raises:
        InputError: names what is free and what is needed, in bytes.
    """
    above = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(above).free + there, sum(needs.values())
    if free < needed:
        parts = ", ".join(f"{what} {size:,}" for what, size in needs.items())
        raise InputError(
            f"{key}={place}: its disk has room for {free:,} bytes, needed are {needed:,}: {parts}"
        )
