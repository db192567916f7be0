"""Random models under random layouts, at work: scored, pruned and distilled, each held against plain torch.

    python -m tests.fuzz.models --cases 300 --seed 1 [--only 17]

From the repository's root. A case draws an architecture, a layout of one to four ranks (with and without sequence
parallelism, uneven stages, fused norms) and what is done. Where the checks of the recipes refuse what was drawn, it has
to be in one plain line; else the work is done on real Megatron models on as many processes and must agree with one
process of plain torch (tests/support/reference.py, written from the papers): logits, scores of all axes, pruned weights
to the bit, losses and their gradients. A case is named by seed and number.
"""

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.config.trainer import TrainerConfig, check_stages, check_tensor_ranks
from nemo_minitron.distillation import LossSettings
from nemo_minitron.errors import InputError
from nemo_minitron.importance.aggregation import STATISTICS
from nemo_minitron.pruning import make_plan, resolve_target
from tests.distributed.test_distillation_losses import check as check_loss
from tests.distributed.test_importance_layouts import own_samples
from tests.distributed.test_pruning_layouts import check_pruned
from tests.fuzz.campaign import misspoken
from tests.support.expected_scores import block_scores, width_scores
from tests.support.kd_problems import expected, problem
from tests.support.pruning_models import FAMILIES
from tests.support.ranks import layout, run_on_ranks
from tests.support.reference import Reference, forward_logits, full_weights, tiny_model

# tensor, pipeline, data
RANKS = [*[(1, 1, 1)] * 3, *[(2, 1, 1), (1, 2, 1), (1, 1, 2)] * 3, (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2)]
SAMPLES, LENGTH = 6, 8
TIMEOUT_S = 120


@dataclass(frozen=True)
class Case:
    """What was drawn."""

    work: str
    arch: Architecture
    ranks: tuple[int, int, int]
    sp: bool
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def at(self) -> dict[str, Any]:
        """As `layout` takes it."""
        return {"tp": self.ranks[0], "pp": self.ranks[1], "sp": self.sp}

    def check(self, arch: Architecture, whose: str) -> None:
        """Refuse a layout that a model does not fit, as the recipes do."""
        own = {key: value for key, value in self.options.items() if key.startswith("num_layers")}
        t = TrainerConfig(pipeline_model_parallel_size=self.ranks[1], **own)
        sizes = {f"{whose} {axis}": getattr(arch, axis) for axis in ("num_query_groups", "ffn_hidden_size")}
        check_tensor_ranks("trainer.tensor_model_parallel_size", self.ranks[0], sizes)
        check_stages(t, arch.num_layers, f"{whose} num_layers")


def architecture(draw: random.Random, ranks: tuple[int, int, int]) -> dict[str, Any]:
    """Any family's kind of model with any sizes; some are illegal, and some do not fit the layout."""
    tp, pp = ranks[:2] if draw.random() < 0.85 else (1, 1)
    groups, per_group = tp * draw.randint(1, 4 // tp), draw.randint(1, 4)
    heads = groups * per_group if draw.random() < 0.95 else groups * per_group + 1
    sizes = {
        "num_layers": pp * draw.randint(1, 6 // pp),
        "hidden_size": draw.randint(8, 40),
        "ffn_hidden_size": tp * draw.randint(1, 40 // tp),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        # Half of it, where only half is rotated, must be even: of an odd number Megatron rotates one more.
        "kv_channels": 4 * draw.randint(1, 4),
        "vocab_size": 4 * draw.randint(2, 16),
        "layernorm_epsilon": draw.choice([1e-5, 1e-6, 1e-2]),
        "add_qkv_bias": draw.random() < 0.3,
        "qk_layernorm": draw.random() < 0.3,
        "share_embeddings_and_output_weights": draw.random() < 0.4,
        "gated_linear_unit": draw.random() < 0.7,
        "rotary_base": draw.choice([1e4, 5e5, 100.0]),
    }
    if draw.random() < 0.2:
        sizes["rope_scaling_factor"] = draw.choice(
            [8.0, 32.0]
        )  # of 8192 tokens: Megatron's own model has no other
    return sizes


def drawn(draw: random.Random) -> Case:
    """A case.

    Raises:
        InputError: an architecture that is none.
    """
    ranks = draw.choice(RANKS)
    arch = FAMILIES[draw.choice(sorted(FAMILIES))].replace(**architecture(draw, ranks))
    options: dict[str, Any] = {"fused_norms": True} if draw.random() < 0.3 else {}
    if ranks[1] > 1 and draw.random() < 0.4:
        place = draw.choice(["first", "last"])
        options[f"num_layers_in_{place}_pipeline_stage"] = draw.randint(1, 4)
    sp = ranks[0] > 1 and draw.random() < 0.5
    work = draw.choice(["score", "prune", "prune", "distill"])
    given = {"score": aggregations, "prune": sizes, "distill": settings}[work](draw, arch)
    return Case(work, arch, ranks, sp, options, given, draw.randrange(10**6))


def aggregations(draw: random.Random, arch: Architecture) -> dict[str, Any]:
    """Of the scores over samples and tokens; the length of blocks."""
    batch, sequence = draw.choice([*STATISTICS]), draw.choice([*STATISTICS])
    return {"batch": batch, "sequence": sequence, "block": draw.randint(1, arch.num_layers)}


def sizes(draw: random.Random, arch: Architecture) -> dict[str, Any]:
    """Of a pruned model: absolute, as fractions, too large, or left alone; heads go with their groups, mostly."""
    found: dict[str, Any] = {}
    for axis in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        size = getattr(arch, axis)
        choices = [None, draw.randint(1, size), draw.randint(1, size), draw.choice(["1/2", "3/4", 0.6, 1.0])]
        value = draw.choice([*choices, size + 1] if draw.random() < 0.1 else choices)
        if value is not None:
            found[axis] = value
    if draw.random() < 0.7 and "num_query_groups" in found:
        found.pop("num_attention_heads", None)
    return found


def settings(draw: random.Random, arch: Architecture) -> dict[str, Any]:
    """Of a distillation loss; some are illegal."""
    return {
        "divergence": draw.choice(["forward_kl", "reverse_kl", "jensen_shannon"]),
        "beta": draw.choice(
            [0.5, round(draw.uniform(0.01, 0.99), 3), 0.0, 1.0][: 4 if draw.random() < 0.1 else 2]
        ),
        "temperature": draw.choice(
            [1.0, round(draw.uniform(0.3, 5.0), 3), 0.0][: 3 if draw.random() < 0.1 else 2]
        ),
        "top_k": draw.choice([None, draw.randint(1, arch.vocab_size), draw.randint(0, 3)]),
        "tail": draw.random() < 0.7,
        "ce_weight": draw.choice([0.0, round(draw.uniform(0, 2), 3)]),
    }


def work(case: Case) -> None:
    """Do it, and compare.

    Raises:
        InputError: what was drawn does not fit.
        AssertionError: another answer than the reference's.
    """
    world = case.ranks[0] * case.ranks[1] * case.ranks[2]
    if case.work == "distill":
        LossSettings(**case.given)
        run_on_ranks(world, distil, case, timeout=TIMEOUT_S)
        return
    case.check(case.arch, "the source's")
    if case.work == "score":
        run_on_ranks(world, score, case, timeout=TIMEOUT_S)
        return
    target = resolve_target(case.arch, case.given)
    case.check(target, "the target's")
    plan = make_plan(case.arch, target, importance="random", seed=case.seed, source_sha256="")
    run_on_ranks(world, check_pruned, case.at, plan, case.options, timeout=TIMEOUT_S)


def distil(case: Case) -> None:
    """On ranks: loss, its parts and both gradients, to 1e-9 in float64."""
    torch.set_num_threads(1)
    draw, tp = random.Random(case.seed), case.ranks[0]
    made = layout(**case.at)
    padded = [tp * -(-case.arch.vocab_size // tp) + tp * draw.randint(0, 40) for _ in range(2)]
    p = problem(
        case.seed,
        s=tp * draw.randint(1, 4),
        b=draw.randint(1, 3),
        vocab_size=case.arch.vocab_size,
        padded=padded[0],
        teacher_padded=padded[1],
        scale=draw.choice([0.1, 1.0, 3.0]),
    )
    loss = LossSettings(**case.given)
    check_loss(p, loss, expected(p, loss, upstream=2.0), made.sp, tolerance=1e-9)


def score(case: Case) -> None:
    """On ranks: logits to 1e-4, and the scores of every axis."""
    from nemo_minitron.importance import BlockInfluenceCollector, ImportanceCollector

    made = layout(**case.at)
    arch, weights = case.arch, full_weights(case.arch, case.seed)
    model = tiny_model(arch, weights=weights, sequence_parallel=made.sp, **case.options)
    tokens = torch.randint(
        arch.vocab_size, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(case.seed)
    )
    batch, sequence, block = case.given["batch"], case.given["sequence"], case.given["block"]
    with (
        ImportanceCollector([model], batch=batch, sequence=sequence) as collector,
        BlockInfluenceCollector([model], [block]) as blocks,
    ):
        logits = forward_logits(model, own_samples(tokens), 1)
    found, influence = collector.finish(), blocks.finish()
    wanted = own_samples(Reference(weights, arch)(tokens))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    for axis, values in width_scores(weights, arch, tokens, batch, sequence).items():
        # Variances of float32 activations carry their rounding twice.
        rtol = 1e-3 if "var" in (batch, sequence) else 1e-4
        torch.testing.assert_close(
            found[axis].double(), values, rtol=rtol, atol=rtol * float(values.mean()), msg=axis
        )
    name = "layers/block_influence" if block == 1 else f"blocks/block_influence/{block}"
    torch.testing.assert_close(
        influence[name].double(), block_scores(weights, arch, tokens, block)[0], rtol=1e-4, atol=1e-5
    )


def verdict(seed: int, number: int) -> tuple[str, str]:
    """What came of a case: "refused", "equal" or "fault"; what was done, and what was said."""
    case = None
    try:
        case = drawn(random.Random(f"{seed}/models/{number}"))
        work(case)
    except InputError as error:
        fault = misspoken(str(error), [])
        return ("fault", fault) if fault else ("refused", str(error))
    except Exception:
        return "fault", f"{case}\n{traceback.format_exc()}"
    return "equal", f"{case.work} on {case.ranks}"


def main() -> int:
    """Run them and count; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args()
    counts, begin = Counter[str](), time.monotonic()
    for number in range(options.cases) if options.only is None else [options.only]:
        came, said = verdict(options.seed, number)
        counts[came if came != "equal" else said] += 1
        if came == "fault" or options.only is not None:
            print(f"models:{number} {came}: {said}", flush=True)
    seconds = round(time.monotonic() - begin)
    equal = sum(count for name, count in counts.items() if name not in ("fault", "refused"))
    print(json.dumps({**dict(sorted(counts.items())), "seconds": seconds}))
    print(f"seed {options.seed}: {equal} equal, {counts['refused']} refused, {counts['fault']} faults")
    return 1 if counts["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
