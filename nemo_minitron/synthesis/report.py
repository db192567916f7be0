"""How good a teacher's text is, in numbers and in a few excerpts."""

import lzma
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nemo_minitron.config.synthesize import SynthesizeConfig
from nemo_minitron.synthesis.filters import FILTERS, Text, repetition, windows
from nemo_minitron.synthesis.store import Written

_LARGEST_N = 4
_XZ_PRESET = 9
_EXCERPT_CHARACTERS = 600


def distinct(texts: Iterable[list[int]], n: int) -> float:
    """Distinct n-grams of tokens in all texts together, over their number (arXiv 1510.03055, section 5.2).

    It falls with the amount of text, so only equal amounts can be compared; 0 where there is no n-gram.
    """
    grams = [windows(tokens, n) for tokens in texts]
    total = sum(map(len, grams))
    return 0.0 if not total else len(np.unique(np.concatenate(grams), axis=0)) / total


def compression(text: str) -> float:
    """Bytes of a text in UTF-8 over those that `xz -9` makes of it: the more it repeats itself, the higher."""
    data = text.encode()
    return len(data) / len(lzma.compress(data, preset=_XZ_PRESET))


def diversity(texts: Sequence[tuple[list[int], str]], ngram: int) -> dict[str, float]:
    """Numbers that tell lively text from a parrot's.

    Args:
        texts: tokens and text of each.
        ngram: of `repetition`.
    """
    tokens = [ids for ids, _ in texts]
    return {
        **{f"distinct_{n}": distinct(tokens, n) for n in range(1, _LARGEST_N + 1)},
        "repetition_mean": float(np.mean([repetition(ids, ngram) for ids in tokens])) if tokens else 0.0,
        "compression_ratio": compression("\n".join(text for _, text in texts)),
    }


def quality(
    settings: SynthesizeConfig,
    written: Sequence[Written],
    kept: Sequence[Text],
    dropped: dict[str, int],
    reference: Sequence[tuple[list[int], str]],
) -> dict[str, Any]:
    """The report as flat keys; losses in nats a token under the teacher, at temperature 1.

    Args:
        written: all samples.
        kept: those that were kept.
        dropped: samples by filter.
        reference: tokens and text of the corpus, as much as was kept; empty where there is none.
    """
    new = sum(len(text.written.new) for text in kept)
    report: dict[str, Any] = {
        "samples_asked": settings.samples,
        "samples_written": len(written),
        "samples_kept": len(kept),
        **{f"dropped_{name}": dropped[name] for name in FILTERS},
        "tokens_prompts_kept": sum(len(text.written.prompt) for text in kept),
        "tokens_written": sum(len(sample.new) for sample in written),
        "tokens_kept": new,
        "ended_share": sum(text.written.ended for text in kept) / max(1, len(kept)),
        "lm_loss_nats_teacher": sum(text.written.nats for text in kept) / max(1, new),
        "lm_loss_nats_teacher_written": sum(s.nats for s in written)
        / max(1, sum(len(s.new) for s in written)),
        **diversity([(text.written.new, text.new) for text in kept], settings.repetition_ngram),
    }
    if reference:
        own = diversity(reference, settings.repetition_ngram)
        report |= {f"{key}_corpus": value for key, value in own.items()}
    return report


def excerpts(kept: Sequence[Text], count: int) -> list[dict[str, Any]]:
    """`count` of the kept texts, evenly spaced, cut short."""
    chosen = [kept[len(kept) * i // count] for i in range(min(count, len(kept)))]
    return [
        {
            "index": text.written.index,
            "prompt": text.prompt[-_EXCERPT_CHARACTERS:],
            "new": text.new[:_EXCERPT_CHARACTERS],
            "lm_loss_nats_teacher": text.written.nats / max(1, len(text.written.new)),
        }
        for text in chosen
    ]


def markdown(report: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    """The report for people: a table of numbers, the corpus's beside, and the excerpts."""
    lines = ["# The teacher's text", "", "| | text | corpus |", "|---|---|---|"]
    for key, value in report.items():
        if not key.endswith("_corpus"):
            beside = report.get(f"{key}_corpus")
            lines.append(f"| {key} | {_number(value)} | {'' if beside is None else _number(beside)} |")
    for excerpt in shown:
        fence = "`" * (3 + max(excerpt["prompt"].count("```"), excerpt["new"].count("```"), 0) * 3)
        title = f"## Sample {excerpt['index']}, {excerpt['lm_loss_nats_teacher']:.2f} nats a token"
        lines += ["", title, "", "Prompt:", "", fence, excerpt["prompt"], fence, ""]
        lines += ["Written:", "", fence, excerpt["new"], fence]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
