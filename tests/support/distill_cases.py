"""What distillation, correction and the search's short distillation refuse; see test_bad_input.py."""

import json
from collections.abc import Callable

from tests.support.cases import RANKS, Case, Places, write


def case(overrides: list[str] | Callable[[Places], list[str]], *says: str, **more: object) -> Case:
    return Case(overrides, list(says), **{"recipe": "distill", **more})  # type: ignore[arg-type]


def between(name: str, value: str, *says: str, layers: str = "late") -> Case:
    chosen = [f"distill.intermediate.layers={layers}"] if name != "layers" else []
    return case([*chosen, f"distill.intermediate.{name}={value}"], *says)


def tokenizer_with(
    name: str, change: Callable[[dict[str, int], list[object]], None]
) -> Callable[[Places], list[str]]:
    """A teacher whose BPE has other entries."""

    def make(p: Places) -> list[str]:
        bad = p.copy(name, p.huggingface)
        tokenizer = json.loads((bad / "tokenizer.json").read_text())
        change(tokenizer["model"]["vocab"], tokenizer["model"]["merges"])
        (bad / "tokenizer.json").write_text(json.dumps(tokenizer))
        return [f"teacher={bad}"]

    return make


def swap(vocab: dict[str, int], merges: list[object]) -> None:
    one, other = [word for word, number in vocab.items() if number in (300, 301)]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def shorten(vocab: dict[str, int], merges: list[object]) -> None:
    vocab.pop(max(vocab, key=lambda word: vocab[word]))
    merges.pop()


def two_layers_left(p: Places, layers: str = "{2: 3}") -> list[str]:
    """A student that kept the layers 0 and 3, with its plan beside it, and a map of layers."""
    from safetensors.torch import load_file, save_file

    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.pruning import Kept, PrunePlan

    student = p.copy(f"two-layers-{len(layers)}", p.huggingface)
    weights = load_file(student / "model.safetensors")
    left = {n: w for n, w in weights.items() if not n.startswith(("model.layers.1.", "model.layers.2."))}
    left = {n.replace("model.layers.3.", "model.layers.1."): w for n, w in left.items()}
    save_file(left, student / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((student / "config.json").read_text())
    write(student / "config.json", json.dumps({**config, "num_hidden_layers": 2}))
    source = find_source(p.huggingface)
    target = source.architecture.replace(num_layers=2)
    PrunePlan(source.sha256(), source.architecture, target, {}, Kept(layers=[0, 3])).save(
        student / "plan.json"
    )
    return [f"student={student}", f"distill.intermediate.layers={layers}"]


def half_a_student(p: Places) -> list[str]:
    bad = p.copy("half-student", p.checkpoint)
    (bad / "weights" / ".metadata").unlink()
    return [f"student={bad}"]


CASES: dict[str, Case] = {
    "no steps of distillation": case(["distill.max_steps=0"], "distill.max_steps=0", "at least 1"),
    "batches of distillation": case(
        ["distill.global_batch_size=12"], "distill.global_batch_size=12", "micro_batch_size 8"
    ),
    "no loss": case(["distill.loss=kl"], "distill.loss=kl", "forward_kl", "cross_entropy"),
    "temperature": case(["distill.temperature=0"], "distill.temperature=0.0", "above 0"),
    "beta": case(
        ["distill.loss=jensen_shannon", "distill.beta=1"], "distill.beta=1.0", "above 0 and below 1"
    ),
    "top k": case(["distill.top_k=0"], "distill.top_k=0", "at least 1"),
    "weight of the labels": case(["distill.ce_weight=-1"], "distill.ce_weight=-1.0", "at least 0"),
    "no learning rate": case(["distill.optim.lr=0"], "distill.optim.lr=0.0", "above 0"),
    "learning rate that grows": case(
        ["distill.optim.min_lr=1"], "distill.optim.lr=0.001", "distill.optim.min_lr=1.0"
    ),
    "learning rate of nothing": case(["distill.optim.lr=nan"], "distill.optim.lr=nan", "above"),
    "momentum": case(["distill.optim.adam_beta2=1"], "distill.optim.adam_beta2=1.0", "below 1"),
    "clipping": case(["distill.optim.clip_grad=-1"], "distill.optim.clip_grad=-1.0", "at least 0"),
    "warm-up": case(["distill.optim.warmup_steps=-1"], "distill.optim.warmup_steps=-1", "at least 0"),
    "student missing": case(["student=/nowhere"], "student=/nowhere", "no such directory"),
    "teacher missing": case(["teacher=/nowhere"], "teacher=/nowhere", "no such directory"),
    "teacher left out": case(
        lambda p: [f"student={p.huggingface}", "teacher=null"],
        "does not say what it was pruned from",
        "distill.loss=cross_entropy",
    ),
    "source for a student": case(["source=/m"], "source=/m", "no use for source", "student, teacher"),
    "half a student": case(half_a_student, "student=", ".metadata", "missing"),
    "another tokenizer": case(
        tokenizer_with("swapped", swap), "teacher", "another tokenizer", "differ at id 300"
    ),
    "another vocabulary": case(
        tokenizer_with("shorter", shorten), "teacher", "another tokenizer", "511 entries, not 512"
    ),
    "conversations that are not read": case(
        ["distill.conversations.train=a.jsonl"],
        "distill.conversations.train=a.jsonl",
        "distill=instruct or instruct_mixed",
    ),
    "conversations of one split": case(
        ["distill.conversations.weight=0.7", "distill.conversations.train=a.jsonl"],
        "distill.conversations.valid=null",
    ),
    "more than all are conversations": case(
        ["distill.conversations.weight=1.5"], "distill.conversations.weight=1.5", "at most 1"
    ),
    "conversations that are too long": case(
        ["distill.conversations.weight=1", "data.seq_length=32"],
        "distill.conversations.valid:",
        "the context has 32",
        "distill.conversations.overlong=drop",
    ),
    "nothing left of the conversations": case(
        ["distill.conversations.weight=1", "distill.conversations.overlong=drop", "data.seq_length=8"],
        "nothing is left to learn",
    ),
    "layer of the teacher": between("layers", "{9: 1}", "9: 1", "the teacher has layers 0 to 3"),
    "layer of the student": between("layers", "{1: 9}", "1: 9", "the student has layers 0 to 3"),
    "one layer twice": between("layers", "{1: 2, 3: 2}", "names a student layer twice"),
    "layers that cross": between("layers", "{1: 3, 3: 1}", "{1: 3, 3: 1}", "cross"),
    "layers of a word": between("layers", "early", "distill.intermediate.layers=early", "{29: 13}"),
    "a layer that was pruned": case(two_layers_left, "2: 3", "the student has layers 0 to 1", "[0, 3]"),
    "too few layers": case(
        lambda p: two_layers_left(p, "late"), "distill.intermediate.layers", "the student has layers 0 to 1"
    ),
    "distance": between("distance", "l1", "distill.intermediate.distance=l1", "cosine, mse"),
    "place": between("at", "input", "distill.intermediate.at=input", "output, norm"),
    "projection": between("projection", "both", "distill.intermediate.projection=both", "shared, each"),
    "weight of states": between("alpha", "-1", "distill.intermediate.alpha=-1.0", "above 0"),
    "states of no teacher": case(
        ["distill.loss=cross_entropy", "distill.intermediate.embedding=true"], "needs a teacher"
    ),
    "states of layers run twice": case(
        ["distill.intermediate.layers=late", "trainer.recompute_granularity=full"],
        "recompute_granularity=full",
    ),
    "one projection on two stages": case(
        [
            "distill.intermediate.layers={1: 1, 3: 3}",
            "trainer.pipeline_model_parallel_size=2",
            "trainer.micro_batch_size=4",
        ],
        "distill.intermediate.projection=shared",
        "must be each",
        env=RANKS,
    ),
    "correction by a divergence": case(
        ["distill.loss=forward_kl"],
        "distill.loss=forward_kl",
        "must be cross_entropy",
        recipe="correct_teacher",
        preset="seed=1",
    ),
    "correction of nothing": case(
        ["distill.from_scratch=true"], "from_scratch=True", recipe="correct_teacher", preset="seed=1"
    ),
    "correction of a missing teacher": case(
        ["teacher=/nowhere"],
        "teacher=/nowhere",
        "no such directory",
        recipe="correct_teacher",
        preset="seed=1",
    ),
    **{
        f"search {name}": case(overrides, *says, recipe="search", preset="search.slack=0.9")
        for name, (overrides, *says) in {
            "steps below none": (["search.distill_steps=-1"], "search.distill_steps=-1", "at least 0"),
            "candidates without steps": (
                ["search.distill_candidates=3"],
                "search.distill_candidates=3",
                "search.distill_steps above 0",
            ),
            "no candidates": (
                ["search.distill_steps=40", "search.distill_candidates=0"],
                "search.distill_candidates=0",
                "at least 1",
            ),
            "steps of warm-up": (
                ["search.distill_steps=20", "distill.optim.warmup_steps=20"],
                "search.distill_steps=20",
                "warmup_steps=20",
            ),
            "random weights": (
                ["search.distill_steps=40", "distill.from_scratch=true"],
                "distill.from_scratch=true",
            ),
            "no teacher": (
                ["search.distill_steps=40", "distill.loss=cross_entropy"],
                "distill.loss=cross_entropy",
                "forward_kl",
            ),
            "learning rate": (["search.distill_steps=40", "distill.optim.lr=-1"], "distill.optim.lr=-1.0"),
            "a layer that no candidate has": (
                ["search.distill_steps=40", "distill.intermediate.layers={1: 9}"],
                "1: 9",
                "the student has layers 0 to 3",
            ),
        }.items()
    },
}
