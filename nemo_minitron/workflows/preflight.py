"""What every recipe asks of a checkpoint before it is opened."""

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.config.trainer import TrainerConfig, check_stages, check_tensor_ranks
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.errors import InputError


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


def check_vocabulary(source: Source, data: PreparedData) -> None:
    """Refuse data of a tokenizer that the model has no rows for.

    Raises:
        InputError: names both sizes.
    """
    if data.indexed.vocab_size > source.architecture.vocab_size:
        raise InputError(
            f"data.tokenizer has {data.indexed.vocab_size} entries, the model's vocabulary "
            f"{source.architecture.vocab_size}"
        )


def converted(source: Source, d: DataConfig) -> Source:
    """The NeMo 2 form of a checkpoint: Hugging Face directories are converted once, before ranks start, into
    the cache."""
    from nemo_minitron.nemo.huggingface import import_checkpoint

    if source.kind == "nemo":
        return source
    found = find_source(import_checkpoint(source, cache_dir(d, "checkpoints")))
    assert found.architecture == source.architecture, "NeMo's importer changed the architecture"
    return found
