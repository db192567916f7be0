"""What is kept of a teacher's text: hand-made cases, and set arithmetic in plain Python as the reference."""

import random

import pytest

from nemo_minitron.config.synthesize import SynthesizeConfig
from nemo_minitron.synthesis.filters import FILTERS, Text, TextFilter, repetition
from nemo_minitron.synthesis.near_duplicates import NearDuplicates
from nemo_minitron.synthesis.report import compression, distinct, excerpts, markdown, quality
from nemo_minitron.synthesis.store import Written


def text(index: int, new: list[int], words: str | None = None, nats: float = 1.0) -> Text:
    return Text(Written(index, [0, 1], new, True, nats), "prompt", words or " ".join(map(str, new)))


def drawn(seed: int, length: int = 60) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 3, 4], 1, 0.0),
        ([7, 7, 7, 7], 1, 0.75),
        ([1, 2, 1, 2, 1], 2, 0.5),  # 12 21 12 21
        ([1, 2, 3, 1, 2, 3], 3, 0.25),  # 123 231 312 123
        ([1, 2], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition_counts_ngrams_that_were_there_before(tokens: list[int], n: int, share: float) -> None:
    assert repetition(tokens, n) == share


def test_each_text_is_dropped_for_the_first_reason_that_it_gives() -> None:
    settings = SynthesizeConfig(min_new_tokens=4, repetition_ngram=2, max_repetition=0.4)
    near = drawn(1)
    near[-1] += 1
    texts = {
        "fine": text(0, drawn(1)),
        "too_short": text(1, [5, 6, 7]),
        "repetitive": text(2, [1, 2] * 10),
        "undecodable": text(3, drawn(2), "a \ufffd b"),
        "duplicate": text(4, drawn(3), "  " + " ".join(map(str, drawn(1))) + "\n"),
        "near_duplicate": text(5, near),
        "other": text(6, drawn(4)),
    }
    text_filter = TextFilter(settings)
    kept = text_filter.keep(texts.values())
    assert [t.written.index for t in kept] == [0, 6]
    assert text_filter.dropped == dict.fromkeys(FILTERS, 1)


def test_a_text_that_was_dropped_makes_no_other_a_copy() -> None:
    text_filter = TextFilter(SynthesizeConfig(min_new_tokens=4, near_duplicate_jaccard=None))
    assert [
        t.written.index for t in text_filter.keep([text(0, [1, 2], "a"), text(1, [1, 2, 3, 4], "a")])
    ] == [1]


def test_near_duplicates_can_be_left_in() -> None:
    near = [*drawn(1)[:-1], 1001]
    settings = SynthesizeConfig(near_duplicate_jaccard=None)
    assert len(TextFilter(settings).keep([text(0, drawn(1)), text(1, near)])) == 2


def jaccard(a: list[int], b: list[int]) -> float:
    sets = [{tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_are_those_of_a_jaccard_index_above_the_threshold() -> None:
    """Pairs around the threshold: a changed middle takes five 5-grams away and adds five."""
    agree = 0
    for seed in range(200):
        base = drawn(seed, 120)
        other = list(base)
        for place in random.Random(seed).sample(range(120), 1 + seed % 8):
            other[place] = 1000 + place
        found = NearDuplicates(0.7)
        assert not found.seen(base)
        expected = jaccard(base, other) >= 0.7
        got = found.seen(other)
        assert expected or not got, "what is below the threshold is never dropped"
        agree += got == expected
    assert agree >= 190, agree


def test_unrelated_and_short_texts_are_no_near_duplicates() -> None:
    found = NearDuplicates(0.5)
    assert not any(found.seen(drawn(seed)) for seed in range(300))
    assert not found.seen([1, 2])
    assert found.seen([1, 2])
    assert not found.seen([2, 1])


def test_distinct_ngrams_over_all_texts() -> None:
    assert distinct([[1, 2, 3], [1, 2]], 1) == 3 / 5
    assert distinct([[1, 2, 3], [1, 2]], 2) == 2 / 3
    assert distinct([[1]], 2) == 0.0


def test_a_parrot_compresses_better() -> None:
    assert compression("the same again. " * 200) > 10 * compression(" ".join(map(str, drawn(0, 500))))


def test_the_report_adds_up() -> None:
    written = [Written(0, [0], [1, 2, 3], True, 6.0), Written(1, [0, 0], [4], False, 5.0)]
    kept = [Text(written[0], "p", "one two three")]
    dropped = {**dict.fromkeys(FILTERS, 0), "too_short": 1}
    report = quality(SynthesizeConfig(samples=2), written, kept, dropped, [([1, 1, 1], "a a a")])
    assert (report["samples_asked"], report["samples_written"], report["samples_kept"]) == (2, 2, 1)
    assert (report["tokens_written"], report["tokens_kept"], report["tokens_prompts_kept"]) == (4, 3, 1)
    assert report["dropped_too_short"] == 1
    assert report["lm_loss_nats_teacher"] == 2.0
    assert report["lm_loss_nats_teacher_written"] == 11 / 4
    assert (report["distinct_1"], report["distinct_1_corpus"]) == (1.0, 1 / 3)
    shown = excerpts(kept, 5)
    assert [e["new"] for e in shown] == ["one two three"]
    assert "| distinct_1 | 1 | 0.3333 |" in markdown(report, shown)


def test_an_excerpt_cannot_end_its_fence() -> None:
    kept = [Text(Written(0, [0], [1], True, 1.0), "```", "x\n``````\ny")]
    page = markdown({}, excerpts(kept, 1)).splitlines()
    fences = [line for line in page if set(line) == {"`"} and len(line) > 6]
    assert len(fences) == 4
    assert len({len(line) for line in fences}) == 1
