"""A candidate's score in a benchmark of lm-evaluation-harness; one rank asks, the others take part."""

from nemo_minitron import parallel
from nemo_minitron.config.evolve import EvolveRecipe
from nemo_minitron.environment import rank
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import catalogue, harness
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.benchmarks.catalogue import Benchmark
from nemo_minitron.export.huggingface import generation_settings
from nemo_minitron.nemo.session import Session
from nemo_minitron.workflows.evaluate.model import ShardedModel
from nemo_minitron.workflows.evolve.check import Prepared


def read(r: EvolveRecipe, prepared: Prepared) -> Benchmark | None:
    """The benchmark's items, on the rank that asks; a launcher's check has only looked at them."""
    assert prepared.wanted is not None
    if rank() != 0 or prepared.benchmark is not None:
        return prepared.benchmark
    return catalogue.load([prepared.wanted], r.data)[0]


def wrong(
    r: EvolveRecipe,
    prepared: Prepared,
    benchmark: Benchmark | None,
    session: Session,
    begin: int,
    end: int | None,
) -> float:
    """1 minus the mean score of the items from `begin` to `end`, the same on every rank.

    Args:
        benchmark: what `read` gave.

    Raises:
        InputError: there are no such items.
    """
    source, tokenizer = prepared.source, prepared.tokenizer
    ends = generation_settings(source.tokenizer, source.architecture.vocab_size).get("eos_token_id")
    stops = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    model = ShardedModel(session, tokenizer, stops, r.eval.batch_size)
    score = None
    if rank() == 0:
        assert benchmark is not None
        score = _score(r, prepared, benchmark, model, begin, end)
        model.dismiss()
    else:
        model.serve()
    score = parallel.broadcast_object(score)
    if score is None:
        raise InputError(
            f"evolve.samples={r.evolve.samples}: {r.evolve.benchmark} has no items after those to measure the result on"
        )
    return 1 - float(score)


def _score(
    r: EvolveRecipe,
    prepared: Prepared,
    benchmark: Benchmark,
    model: ShardedModel,
    begin: int,
    end: int | None,
) -> float | None:
    sharded_lm, _ = harness.language_models()
    lm = sharded_lm(model, prepared.tokenizer, Answers(None))
    settings = harness.Settings(end, benchmark.wanted.chat, r.eval.max_new_tokens)
    rows, items = harness.run(lm, benchmark, settings)
    main, _, chosen = next(row.metric for row in rows if row.main).partition(", ")
    asked = (item for item in items if item["item"] >= begin and item["filter"] == (chosen or item["filter"]))
    scores = [float(item[main]) for item in asked if main in item]
    return sum(scores) / len(scores) if scores else None
