"""The work of `recipes/pretrain.py`: a Llama-architecture GPT from scratch with NeMo 2."""

import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import CHECKPOINT
from nemo_minitron.config.recipes import PretrainRecipe
from nemo_minitron.config.trainer import check_stages, check_tensor_ranks
from nemo_minitron.data.prepare import PreparedData, open_corpus, prepare_data
from nemo_minitron.data.statistics import bits_per_byte, compression_bits_per_byte, unigram_entropy_nats
from nemo_minitron.errors import InputError
from nemo_minitron.run import main as recipe_module


def architecture(recipe: PretrainRecipe, vocab_size: int) -> Architecture:
    """The model's sizes, checked against the layout.

    Raises:
        InputError: sizes that the tensor- or pipeline-parallel size does not divide.
    """
    m, t = recipe.model, recipe.trainer
    arch = Architecture(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.kv_channels,
        vocab_size=vocab_size,
        share_embeddings_and_output_weights=m.share_embeddings_and_output_weights,
        rotary_base=m.rotary_base,
        model_type="llama",
    )
    shared = {f"model.{axis}": getattr(arch, axis) for axis in ("num_query_groups", "ffn_hidden_size")}
    check_tensor_ranks("trainer.tensor_model_parallel_size", t.tensor_model_parallel_size, shared)
    check_stages(t, arch.num_layers, "model.num_layers")
    return arch


@dataclass(frozen=True)
class Prepared:
    """The indexed corpus and the sizes of the model that will be trained on it."""

    data: PreparedData
    architecture: Architecture

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {"data": self.data.to_config()}


def check(recipe: PretrainRecipe) -> Prepared:
    """Prepare the data and check the sizes, before NeMo is imported.

    Raises:
        InputError: what `prepare_data` and `architecture` refuse; no training steps; an export from several ranks.
    """
    if recipe.trainer.max_steps < 1:
        raise InputError(f"trainer.max_steps={recipe.trainer.max_steps}: must be at least 1")
    if recipe.export_dir and recipe.trainer.ranks > 1:
        raise InputError(
            f"export_dir={recipe.export_dir}: is written by one process, not by {recipe.trainer.ranks}"
        )
    data = prepare_data(recipe.data, ready=(recipe.prepared or {}).get("data"))
    return Prepared(data, architecture(recipe, data.indexed.vocab_size))


def run(recipe: PretrainRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or go on where a killed run stopped; then measure the held-out loss and export.

    Returns:
        The fields of `result.json`.
    """
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.nemo.huggingface import export_checkpoint

    last = find_source(_train(recipe, prepared, directory))
    result = _measure(recipe, prepared, last, directory)
    source = find_source(directory / CHECKPOINT)
    result["checkpoint"] = str((directory / CHECKPOINT).resolve())
    if recipe.export_dir:
        export = Path(recipe.export_dir)
        export_checkpoint(source, export)
        (export / "README.md").write_text(card(recipe, result))
        for file in export.iterdir():
            file.chmod(0o644)
    return result


def _train(recipe: PretrainRecipe, prepared: Prepared, directory: Path) -> Path:
    from nemo_minitron.nemo import fit, models, session, trainer
    from nemo_minitron.nemo.counted_tokens import CountedTokens
    from nemo_minitron.nemo.step_log import StepLog

    data, t = prepared.data, recipe.trainer
    steps = StepLog(directory / "steps.jsonl")
    counted = CountedTokens(steps, t.global_batch_size * recipe.data.seq_length)
    config = models.to_config(prepared.architecture, seq_length=recipe.data.seq_length, precision=t.precision)
    config.init_method_std = recipe.model.init_method_std
    trainer.recompute(config, t)
    trainer.seed_everything(recipe.seed)
    tokenizer = session.nemo_tokenizer(data.tokenizer_dir)
    return fit.fit(
        models.to_model(config, tokenizer, trainer.optimizer(recipe.optim, t)),
        trainer.training_data(data.indexed, tokenizer, recipe.data, t, data.index_cache),
        trainer.trainer(t, training=True, callbacks=[counted, steps]),
        directory,
        save_every_n_steps=t.val_check_interval or t.max_steps,
    )


def _measure(recipe: PretrainRecipe, prepared: Prepared, last: Any, directory: Path) -> dict[str, Any]:
    """Loss on the held-out split beside what knows nothing (unigrams) and what knows no language (xz)."""
    from nemo_minitron.nemo import fit
    from nemo_minitron.nemo.session import Session

    data, t, d = prepared.data, recipe.trainer, recipe.data
    session, dtype = Session(last, t), t.checkpoint_dtype or last.dtype
    session.round(dtype)
    loss = session.lm_loss(data, d, "valid", recipe.eval.samples, "held-out loss")
    fit.finish(session, directory, dtype)
    valid_tokens, valid_bytes = data.indexed.tokens["valid"], data.indexed.bytes["valid"]
    xz = compression_bits_per_byte(open_corpus(d))
    return {
        "recipe": "pretrain",
        "params": prepared.architecture.parameters(),
        "steps": t.max_steps,
        "tokens": t.max_steps * t.global_batch_size * d.seq_length,
        "seed": recipe.seed,
        "lm_loss_nats": loss.nats,
        "eval_samples": loss.samples,
        "bits_per_byte": bits_per_byte(loss.nats, valid_tokens, valid_bytes),
        "unigram_entropy_nats": unigram_entropy_nats(data.indexed.valid_prefix),
        "xz_bits_per_byte_alone": xz.alone,
        "xz_bits_per_byte_given_train": xz.given_train,
        "data": d.name,
        "data_sha256": data.indexed.manifest_sha256,
        "python": platform.python_version(),
        "command": " ".join(["python", *map(shlex.quote, sys.argv)]),
        "peak_rss_gib": recipe_module.peak_rss_gib(),
    }


def card(recipe: PretrainRecipe, result: dict[str, Any]) -> str:
    """The README of an exported model: how it was made, and how good it is."""
    m, r = recipe.model, result
    rows = {
        "command": f"`{r['command']}`",
        "seed": r["seed"],
        "steps, tokens": f"{r['steps']:,} steps, {r['tokens']:,} tokens",
        "parameters": f"{r['params']:,}",
        "held-out loss": f"{r['lm_loss_nats']:.4f} nats a token ({r['eval_samples']} sequences of "
        f"{recipe.data.seq_length})",
        "unigram entropy of the held-out tokens": f"{r['unigram_entropy_nats']:.4f} nats a token",
        "held-out bits per byte": f"{r['bits_per_byte']:.4f}",
        "`xz -9` on the held-out files, alone": f"{r['xz_bits_per_byte_alone']:.4f} bits per byte",
        "`xz -9` on them, given the training files": f"{r['xz_bits_per_byte_given_train']:.4f} bits per byte",
        "data": f"{r['data']}, Python {r['python']}, manifest sha256 `{r['data_sha256']}`",
    }
    shape = (
        f"Llama architecture: {m.num_layers} layers, hidden {m.hidden_size}, MLP {m.ffn_hidden_size}, "
        f"{m.num_attention_heads} heads in {m.num_query_groups} groups of head size {m.kv_channels}."
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    head = f"# A small teacher\n\n{shape}\nTrained from scratch by `recipes/pretrain.py`."
    return f"{head}\n\n| | |\n|---|---|\n{table}\n"
