"""The line of numbers that a recipe ends with, out of the fields of its result.json."""

from collections.abc import Callable, Iterator
from typing import Any


def closing_line(fields: dict[str, Any]) -> str:
    """What a user wants to know first: losses, sizes, the share that was kept, what was rounded.

    Args:
        fields: of `result.json`; those that a recipe lacks are left out. Losses are in nats a token.
    """
    parts = [part for tell in (_losses, _sizes, _rounded, _work, _scores) for part in tell(fields)]
    return f"{fields.get('recipe', 'done')}: {', '.join(parts) or 'done'}"


def _losses(f: dict[str, Any]) -> Iterator[str]:
    before, after = f.get("lm_loss_nats_before"), f.get("lm_loss_nats_after")
    if after is not None:
        yield f"LM loss {'' if before is None else f'{before:.3f} -> '}{after:.3f} nats"
    elif f.get("lm_loss_nats") is not None:
        yield f"LM loss {f['lm_loss_nats']:.3f} nats"
    for key, label in (("lm_loss_nats_distilled", "distilled"), ("lm_loss_nats_teacher", "teacher")):
        if f.get(key) is not None:
            yield f"{label} {f[key]:.3f} nats"
    if f.get("valid_loss_nats_after") is not None:
        yield f"validation loss {f['valid_loss_nats_before']:.3f} -> {f['valid_loss_nats_after']:.3f} nats"
    if f.get("task_accuracy_after") is not None:
        yield f"task {f['task_accuracy_before']:.1%} -> {f['task_accuracy_after']:.1%} right"


def _sizes(f: dict[str, Any]) -> Iterator[str]:
    before, after = f.get("params_before"), f.get("params_after")
    if before and after:
        yield f"{count(before)} -> {count(after)} parameters ({after / before:.0%})"
    elif f.get("params"):
        yield f"{count(f['params'])} parameters"
    for axis, (kept, of) in (f.get("kept") or {}).items():
        yield f"{axis} {kept:,} of {of:,}"


def _rounded(f: dict[str, Any]) -> Iterator[str]:
    for axis, asked in (f.get("rounded_from") or {}).items():
        yield f"{axis} rounded from {asked:,}"


def _work(f: dict[str, Any]) -> Iterator[str]:
    shown: list[tuple[str, Callable[[Any], str]]] = [
        ("steps", lambda v: f"{v:,} steps"),
        ("candidates_tried", lambda v: f"{v:,} candidates tried"),
        ("best", lambda v: f"best {v}"),
        ("sequences", lambda v: f"{v:,} sequences"),
        ("samples_kept", lambda v: f"{v:,} samples kept"),
        ("tokens", lambda v: f"{count(v)} tokens"),
        ("bytes", lambda v: f"{v / 2**20:,.1f} MiB"),
        ("tokens_per_s", lambda v: f"{v:,.0f} tokens/s"),
    ]
    for key, say in shown:
        if f.get(key) is not None:
            yield say(f[key])


def _scores(f: dict[str, Any]) -> Iterator[str]:
    if f.get("recipe") == "merge":
        yield f"{len(f['models'])} models by {f['method']}"
    if f.get("recipe") == "evolve":
        yield f"held out {f['held_out_loss']:.3f}, the best of its models {f['held_out_loss_best_model']:.3f}"
    if f.get("recipe") == "pipeline":
        yield f"{len(f['runs'])} runs, {sum(run['kept'] for run in f['runs'])} of them kept"
    if f.get("recipe") == "compare":
        yield f"{len(f['models'])} models beside {f['baseline']}: {f['table']}"
    if f.get("recipe") == "plan_run":
        yield f"estimated: {count(f['trained_tokens'])} tokens of training, {f['pflop']:,.3g} PFLOP"
        yield f"{f['gpu_hours']:,.2f} GPU-hours, {f['most_memory_gib']:.1f} GiB a rank at most"
    if f.get("perplexity") is not None:  # pretraining has bits a byte alone
        yield f"perplexity {f['perplexity']:.2f}"
        if f.get("perplexity_f16") is not None:  # of a quantised export
            yield f"of F16 {f['perplexity_f16']:.2f}"
        elif f.get("bits_per_byte") is not None:
            yield f"{f['bits_per_byte']:.3f} bits a byte"
    if f.get("top1_agreement") is not None:
        yield f"KL {f['kl_from_teacher_nats']:.3f} nats, {f['top1_agreement']:.1%} as the teacher"
    for row in f.get("scores") or ():
        if row["main"]:
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            yield f"{row['task']} {row['score']:.3f}{error}{' (at chance)' if row['at_chance'] else ''}"
    if f.get("overall_score") is not None:
        lenient = f.get("overall_score_lenient")
        also = "" if lenient is None else f" ({lenient:.1%} to a lenient reader)"
        yield f"{f['overall_score']:.1%} of {f['samples']:,} answers right{also}"
    if f.get("gguf_answers"):
        yield f"llama.cpp's answers to {f['gguf_answers_equal']} of {f['gguf_answers']} prompts the same"
    if f.get("recipe") == "instruct_data":
        for key in (key for key in f if key.endswith("_samples")):
            yield f"{f[key]:,} {key.removesuffix('_samples')}"


def count(number: float) -> str:
    """A large number in three or four digits: 3.64M, 134.5M, 1.24B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.2f}{unit}" if value < 10 else f"{value:.1f}{unit}"
    return f"{number:,.0f}"
