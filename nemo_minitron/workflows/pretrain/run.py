"""The work of `recipes/pretrain.py`: a Llama-architecture GPT from scratch with NeMo 2."""

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import CHECKPOINT, find_source
from nemo_minitron.config.recipes import PretrainRecipe
from nemo_minitron.data.prepare import open_corpus
from nemo_minitron.data.statistics import bits_per_byte, compression_bits_per_byte, unigram_entropy_nats
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.nemo import fit, models, session, trainer
from nemo_minitron.nemo.counted_tokens import CountedTokens
from nemo_minitron.nemo.huggingface import export_checkpoint
from nemo_minitron.nemo.session import Session
from nemo_minitron.nemo.step_log import StepLog
from nemo_minitron.workflows.pretrain.check import Prepared


def run(recipe: PretrainRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or resume a run that was killed; then measure the held-out loss and export.

    Returns:
        The fields of `result.json`.
    """
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
        logger=recipe.logger,
    )


def _measure(recipe: PretrainRecipe, prepared: Prepared, last: Any, directory: Path) -> dict[str, Any]:
    """Loss on the held-out split beside what knows nothing (unigrams) and what knows no language (xz)."""
    data, t, d = prepared.data, recipe.trainer, recipe.data
    session, dtype = Session(last, t), t.checkpoint_dtype or last.dtype
    session.round(dtype)
    loss = session.lm_loss(data, d, "valid", recipe.eval.samples, "held-out loss")
    fit.finish(session, directory, dtype)
    xz = compression_bits_per_byte(open_corpus(d))
    return {
        "recipe": "pretrain",
        "params": prepared.architecture.parameters(),
        "steps": t.max_steps,
        "tokens": t.max_steps * t.global_batch_size * d.seq_length,
        "seed": recipe.seed,
        "lm_loss_nats": loss.nats,
        "eval_samples": loss.samples,
        "bits_per_byte": bits_per_byte(loss.nats, 1, data.indexed.bytes_per_token("valid")),
        "unigram_entropy_nats": unigram_entropy_nats(data.indexed.paths("valid")),
        "xz_bits_per_byte_alone": xz.alone,
        "xz_bits_per_byte_given_train": xz.given_train,
        "data": d.name,
        "data_sha256": data.indexed.manifest_sha256,
        "python": platform.python_version(),
        "command": " ".join(["python", *map(shlex.quote, sys.argv)]),
        "peak_rss_gib": peak_rss_gib(),
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
