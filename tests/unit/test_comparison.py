"""Models side by side: paired differences beside numpy, the four groups, tables as csv and as people read them."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_minitron.comparison import picture, rows, table
from nemo_minitron.comparison.measured import Evaluation, read_evaluation
from nemo_minitron.comparison.paired import difference, loss_difference
from nemo_minitron.comparison.rows import Model, Speed
from nemo_minitron.comparison.training import Training, training_of
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError

_DRAWN = np.random.default_rng(5)


def score(task: str, metric: str, values: Any, **more: Any) -> dict[str, Any]:
    """A row of a result.json over items of these values."""
    values = np.asarray(values, float)
    row = {"task": task, "metric": metric, "score": float(values.mean()), "items": len(values), "shots": None}
    row |= {"stderr": float(values.std(ddof=1) / len(values) ** 0.5), "chance": None, "at_chance": False}
    return {**row, "main": True, **more}


def write(home: Path, name: str, items: dict[str, list[dict[str, Any]]], **result: Any) -> Evaluation:
    directory = home / name
    (directory / "items").mkdir(parents=True)
    for label, lines in items.items():
        (directory / "items" / f"{label}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    (directory / "result.json").write_text(json.dumps({"recipe": "evaluate", **result}))
    return read_evaluation(directory, name)


def lines(task: str, metric: str, values: Any, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"task": task, "item": first + n, "sha256": f"{task}{first + n}", "filter": "none", metric: float(v)}
        for n, v in enumerate(values)
    ]


def evaluated(home: Path, name: str, values: Any, **more: Any) -> Evaluation:
    return write(
        home,
        name,
        {"hellaswag_100": lines("hellaswag_100", "acc_norm", values)},
        scores=[score("hellaswag_100", "acc_norm", values, chance=0.25)],
        **more,
    )


def model(name: str, evaluation: Evaluation, **more: Any) -> Model:
    given = {"parameters": 2_000_000, "non_embedding": 1_500_000, "training": Training(), **more}
    return Model(name=name, evaluation=evaluation, **given)


def test_a_paired_difference_is_the_mean_of_the_items_own(tmp_path: Path) -> None:
    a, b = _DRAWN.integers(0, 2, 80), _DRAWN.integers(0, 2, 80)
    first, second = evaluated(tmp_path, "a", a), evaluated(tmp_path, "b", b)
    found = difference(first, second, second.scores[0])
    assert found.value == pytest.approx((b - a).mean())
    assert found.stderr == pytest.approx((b - a).std(ddof=1) / 80**0.5)
    assert found.items == 80
    # Alike but for one item: two means could not tell them apart, the pairs can say how little it is.
    same = evaluated(tmp_path, "c", np.where(np.arange(80) == 3, 1 - a, a))
    assert difference(first, same, same.scores[0]).stderr == pytest.approx(1 / 80)


def test_other_items_have_no_difference(tmp_path: Path) -> None:
    values = _DRAWN.integers(0, 2, 20)
    first = evaluated(tmp_path, "a", values)
    fewer = evaluated(tmp_path, "fewer", values[:10])
    assert difference(first, fewer, fewer.scores[0]).why == "10 items, 20 of the baseline's"
    others = write(
        tmp_path,
        "others",
        {"hellaswag_100": lines("hellaswag_100", "acc_norm", values, first=5)},
        scores=[score("hellaswag_100", "acc_norm", values)],
    )
    assert difference(first, others, others.scores[0]).why == "the items are others"
    # The same numbers with other contents: a user's file that was changed.
    changed = [{**line, "sha256": "x"} for line in lines("hellaswag_100", "acc_norm", values)]
    again = write(
        tmp_path, "changed", {"hellaswag_100": changed}, scores=[score("hellaswag_100", "acc_norm", values)]
    )
    assert difference(first, again, again.scores[0]).why == "the items are others"
    bare = [{k: v for k, v in line.items() if k != "sha256"} for line in changed]  # of an earlier version
    old = write(tmp_path, "old", {"hellaswag_100": bare}, scores=[score("hellaswag_100", "acc_norm", values)])
    assert difference(first, old, old.scores[0]).value == 0
    wrong = write(
        tmp_path,
        "wrong",
        {"hellaswag_100": lines("hellaswag_100", "acc_norm", values)},
        scores=[score("hellaswag_100", "acc_norm", 1 - values)],
    )
    assert difference(first, wrong, wrong.scores[0]).why == "the score is no mean over items"
    (first.directory / "items" / "hellaswag_100.jsonl").write_text("{")
    assert difference(first, old, old.scores[0]).why == "what each item scored was not kept"


def test_role_play_is_compared_by_question(tmp_path: Path) -> None:
    ratings = {name: _DRAWN.uniform(1, 10, (6, 2)) for name in "ab"}
    made = {}
    for name, given in ratings.items():
        items = [
            {"item": n, "category": "roleplay" if n % 2 else "math", "answers": [], "ratings": list(pair)}
            for n, pair in enumerate(given)
        ]
        means = given.mean(1)
        scored = [
            score("mt_bench_80", "rating", means),
            score("mt_bench_80", "rating, turn 2", given[:, 1], main=False),
            score("mt_bench_80", "rating, roleplay", means[1::2], main=False),
        ]
        made[name] = write(tmp_path, name, {"mt_bench_80": items}, scores=scored)
    change = ratings["b"] - ratings["a"]
    expected = [change.mean(1), change[:, 1], change.mean(1)[1::2]]
    for row, values in zip(made["b"].scores, expected, strict=True):
        found = difference(made["a"], made["b"], row)
        assert found.value == pytest.approx(values.mean())
        assert found.stderr == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)
    both = [model(name, evaluation) for name, evaluation in made.items()]
    shown = {row.name: row.group for row in rows.score_rows(both, both[0])}
    assert shown["mt_bench_80, rating, roleplay"] == "role-play"
    assert shown["mt_bench_80, rating"] == "others"
    assert "mt_bench_80, rating, turn 2" not in shown


def text(values: Any, tokens: int = 100, **more: Any) -> dict[str, Any]:
    nats = float(np.mean(values))
    return {
        "data": "stdlib",
        "lm_samples": len(values),
        "lm_tokens": tokens * len(values),
        "lm_bytes": 3000,
        "lm_loss_nats": nats,
        "lm_loss_stderr": 0.1,
        "perplexity": float(np.exp(nats)),
        "bits_per_byte": nats,
        "token_accuracy": 0.5,
        "tokenizer_sha256": "t",
        **more,
    }


def of_text(home: Path, name: str, values: Any, **more: Any) -> Evaluation:
    items = [{"item": n, "nats": 100 * float(v), "tokens": 100} for n, v in enumerate(values)]
    return write(home, name, {"held_out_text": items}, scores=[], **text(values, **more))


def test_losses_are_paired_by_sequence_and_left_out_for_other_tokens(tmp_path: Path) -> None:
    a, b = _DRAWN.uniform(1, 4, 12), _DRAWN.uniform(1, 4, 12)
    first, second = of_text(tmp_path, "a", a), of_text(tmp_path, "b", b)
    found = loss_difference(first, second)
    assert found.value == pytest.approx((b - a).mean())
    assert found.stderr == pytest.approx((b - a).std(ddof=1) / 12**0.5)
    models = [
        model("a", first),
        model("b", second),
        model("other tokens", of_text(tmp_path, "c", b, tokenizer_sha256="u", lm_bytes=2000)),
        model("other text", of_text(tmp_path, "d", b, data="files")),
    ]
    made, said = rows.text_rows(models, models[0])
    assert {row.name: sorted(row.cells) for row in made} == {
        "bits a byte": ["a", "b", "other tokens"],
        "LM loss, nats a token": ["a", "b"],
        "perplexity": ["a", "b"],
        "token accuracy": ["a", "b"],
    }
    assert [line.partition(":")[0] for line in said] == ["other text", "other tokens"]


def whole(models: list[Model], **more: Any) -> table.Table:
    given = {
        "models": models,
        "baseline": models[0].name,
        "scores": rows.score_rows(models, models[0]),
        "text": rows.text_rows(models, models[0])[0],
        "said": [],
        "command": "python recipes/compare.py",
        "machine": "Machine: M.",
        "how": "How.",
        "published": True,
    }
    return table.Table(**{**given, **more})


def test_the_tables_say_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    values = np.arange(80) % 4 == 0
    chance = score("hellaswag_100", "acc_norm", values, chance=0.25, at_chance=True)
    guess = write(
        tmp_path, "b", {"hellaswag_100": lines("hellaswag_100", "acc_norm", values)}, scores=[chance]
    )
    better = evaluated(tmp_path, "a", np.arange(80) % 4 != 0)
    speed = Speed("llama.cpp", "cpu", [0.2, 0.1, 0.4], [30.0, 50.0, 40.0], [1.0, 1.0, 1.5])
    training = Training(tokens=4_096, flops=3.2e12, left_out=["sft"], recipes=["distill", "sft"])
    models = [model("a|b", better), model("guess", guess, speed=speed, training=training, bytes=2**20)]
    found = whole(models)
    page = table.as_markdown(found)
    for group in ("instruction following", "role-play", "retrieval-augmented generation", "function calling"):
        assert f"| {group} | not run |" in page
    assert "0.750 ± 0.049 (n = 80)" in page
    assert "0.250 ± 0.049 (n = 80), *at chance*" in page
    assert "**-0.500 ± 0.097**" in page
    assert "40.0 (30.0 to 50.0) | 0.200 (0.100 to 0.400) | 1.00 (1.00 to 1.50) | llama.cpp, cpu |" in page
    assert "4.1k (without sft) | 3.20e+12 (without sft) | 1.0 MiB" in page
    assert "a\\|b" in page
    measured, published = page.split("## Published by others")
    assert "Llama-3.1-8B" in published
    assert "Llama" not in measured
    assert "Published" not in table.as_markdown(whole(models, published=False))
    read = list(csv.DictReader(io.StringIO(table.as_csv(found))))
    assert {line["model"] for line in read} == {"a|b", "guess"}
    by = {(line["model"], line["measure"]): line for line in read}
    row = by["guess", "hellaswag_100, acc_norm"]
    assert (float(row["value"]), row["at_chance"], float(row["difference"])) == (0.25, "yes", -0.5)
    assert by["guess", "decoded tokens/s"]["value"] == "40.0"
    assert ("a|b", "decoded tokens/s") not in by


def test_one_model_alone_is_shown(tmp_path: Path) -> None:
    page = table.as_markdown(whole([model("a", of_text(tmp_path, "a", [2.0, 3.0]))]))
    assert "Differences" not in page
    assert "No benchmark was run" in page


def test_models_of_one_size_stand_beside_each_other_in_the_picture() -> None:
    right = picture.beside([81.4, 134.5, 81.4, 81.4])
    assert right[1] == 0 == sum(right)  # around their place
    assert len({right[0], right[2], right[3]}) == 3


def test_the_picture_shows_each_model_over_size_and_speed(tmp_path: Path) -> None:
    speed = Speed("transformers", "cpu", [0.1], [30.0], [1.0])
    made = [
        model(name, evaluated(tmp_path, name, _DRAWN.integers(0, 2, 40), **text([2.0 + n, 3.0])), speed=speed)
        for n, name in enumerate(["a", "b", "c"])
    ]
    scores, said = rows.score_rows(made, made[0]), rows.text_rows(made, made[0])[0]
    file = tmp_path / "compare.png"
    assert picture.draw(made, scores, said, file)
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # matplotlib's first three
        # In four panels and the legend, some 40 pixels a marker.
        assert (np.abs(pixels - colour).sum(1) < 12).sum() > 5 * 20, colour
    assert not picture.draw([model("a", of_text(tmp_path, "x", [2.0]), parameters=None)], [], [], file)


def test_quality_is_the_mean_of_the_benchmarks_that_all_have(tmp_path: Path) -> None:
    def two(name: str, first: Any, second: Any) -> Model:
        items = {"x": lines("x", "acc", first), "y": lines("y", "acc", second)}
        scored = [score("x", "acc", first, chance=0.25), score("y", "acc", second, chance=0.5)]
        return model(name, write(tmp_path, name, items, scores=scored))

    a, b = _DRAWN.integers(0, 2, (2, 30)), _DRAWN.integers(0, 2, (2, 30))
    made = [two("a", *a), two("b", *b)]
    title, found, chance = rows.quality(rows.score_rows(made, made[0]), made)
    assert title == "mean of 2 benchmarks"
    assert chance == 0.375
    for name, values in (("a", a), ("b", b)):
        assert found[name][0] == pytest.approx(values.mean())
        assert found[name][1] == pytest.approx(((values.var(axis=1, ddof=1) / 30).sum() / 4) ** 0.5)


@pytest.mark.parametrize(
    "bad", ["{", '{"recipe": "prune"}', '{"recipe": "evaluate", "scores": [{"task": 1}]}', "[]"]
)
def test_a_damaged_result_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "result.json").write_text(bad)
    with pytest.raises(InputError, match=r"^models=x: result\.json cannot be read"):
        read_evaluation(tmp_path, "models=x")


def test_tokens_and_flops_are_those_of_the_runs_since_the_base_model(tmp_path: Path) -> None:
    """By hand: 2 FLOPs a weight and token forward, three times that to train, the teacher's forward pass beside it."""
    from tests.support.hf_families import make_model

    def run(name: str, length: int, **result: Any) -> Path:
        directory = tmp_path / name
        make_model(directory, "qwen2", num_hidden_layers=1 if name != "teacher" else 2)
        (directory / "result.json").write_text(json.dumps(result))
        (directory / "config.yaml").write_text(f"# python x\n# v\ndata:\n  seq_length: {length}\n")
        return directory

    teacher = run("teacher", 16, recipe="pretrain", tokens=1000)
    pruned = run("pruned", 16, recipe="prune", source=str(teacher))
    learned = run("learned", 8, recipe="distill", tokens=64, student=str(pruned), teacher=str(teacher))
    tuned = run("tuned", 8, recipe="sft", student=str(learned))
    fresh = run("fresh", 8, recipe="distill", tokens=64, student=str(pruned), teacher=None, from_scratch=True)

    def forward(layers: int, length: int) -> int:
        h, f, q, kv, v = 40, 48, 64, 32, 64
        layer = (
            h * (q + 2 * kv) + q + 2 * kv + q * h + 3 * h * f
        )  # with Qwen2's bias on queries, keys and values
        return 2 * (layers * (layer + 2 * length * q) + v * h)

    expected = 3 * forward(2, 16) * 1000 + (3 * forward(1, 8) + forward(2, 8)) * 64
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    found = training_of(tuned, data)
    assert (found.tokens, found.left_out) == (1064, ["sft"])
    assert found.flops == pytest.approx(expected)
    assert found.recipes == ["pretrain", "prune", "distill", "sft"]
    assert training_of(fresh, data) == Training(64, 3.0 * forward(1, 8) * 64, [], ["distill"])
    (learned / "config.yaml").write_text("# python x\n[")
    assert training_of(tuned, data).flops is None
    assert training_of(tmp_path / "nowhere", data) == Training()
