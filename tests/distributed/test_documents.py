"""Beginnings and limits of documents in packed sequences, from recipes on a toy Gemma; transformers is the reference.

The expected sequences are read with numpy from the corpus's files.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import ranks, sessions
from tests.support.hf_families import VOCAB_SIZE, make_model
from tests.support.packed_stream import PackedStream, documents
from tests.support.sessions import PATIENCE_S

SEQ_LENGTH, WORDS = 64, 18
EOD, BOS, FIRST = 0, 1, 3


def make_toy(directory: Path, **changes: Any) -> Any:
    """A Gemma whose tokenizer begins each text with <bos>, by a template alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    model = make_model(directory, "gemma", num_hidden_layers=2, max_position_embeddings=SEQ_LENGTH, **changes)
    words = {"<eod>": EOD, "<bos>": BOS, "<unk>": 2, **{f"w{i}": i for i in range(FIRST, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eod>", bos_token="<bos>", pad_token="<eod>", unk_token="<unk>"
    ).save_pretrained(directory)
    return model


def write_texts(path: Path, seed: int) -> None:
    """Documents of 18 words, which are 20 tokens."""
    words = torch.randint(FIRST, VOCAB_SIZE, (12, WORDS), generator=torch.Generator().manual_seed(seed))
    rows = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in words.tolist()]
    path.write_text("\n".join(rows) + "\n")


@dataclass(frozen=True)
class Toys:
    """Two transformers models, their NeMo 2 forms by name, and a corpus."""

    home: Path
    nemo: dict[str, str]
    student: Any
    teacher: Any

    def overrides(self, name: str, *more: str) -> list[str]:
        return [
            "data=files",
            f"data.train={self.home}/train.jsonl",
            f"data.valid={self.home}/valid.jsonl",
            f"data.seq_length={SEQ_LENGTH}",
            f"data.cache_dir={self.home}/cache",
            "eval.samples=null",
            f"run_dir={self.home / name}",
            *more,
        ]

    def prefix(self, split: str, bos: bool = True) -> str:
        """Of the index files that begin documents so."""
        (found,) = (
            path.parent
            for path in (self.home / "cache" / "data").glob("*/manifest.json")
            if bool(json.loads(path.read_text())["beginning"]) == bos
        )
        return str(found / split)

    def stream(self, split: str, *, whole_pass: bool, bos: bool = True) -> PackedStream:
        prefix = self.prefix(split, bos)
        return PackedStream(Path(prefix).parent / "order", prefix, SEQ_LENGTH, split, whole_pass)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    home = tmp_path_factory.mktemp("toys")
    for number, split in enumerate(("train", "valid")):
        write_texts(home / f"{split}.jsonl", number)
    student, teacher = make_toy(home / "student", initializer_range=0.2), make_toy(home / "teacher")
    learn(teacher, home / "teacher", home / "valid.jsonl")
    (nemo,) = ranks.run_on_ranks(1, imported, str(home), timeout=PATIENCE_S)
    return Toys(home, nemo, student, teacher)


def learn(model: Any, directory: Path, texts: Path) -> None:
    """A teacher has to do better than guessing; this one learns the held-out documents by heart."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    alone = torch.tensor([[*tokenizer(row)["input_ids"], EOD, BOS] for row in rows])
    in_a_row = alone[:, :-1].reshape(4, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(tokens, labels=tokens).loss for tokens in (alone, in_a_row)).backward()
        optimizer.step()
    model.save_pretrained(directory)


def imported(home: str) -> dict[str, str]:
    return {name: sessions.imported(f"{home}/{name}", f"{home}/cache") for name in ("student", "teacher")}


def pieces(tokens: Tensor, limits: bool) -> list[Tensor]:
    """A sequence, or the documents and parts of documents that it is made of."""
    if not limits:
        return [tokens]
    ends = (tokens == EOD).nonzero()[:, 0].add(1).tolist()
    return [t for t in tokens.tensor_split(ends) if len(t)]


def log_probabilities(model: Any, tokens: Tensor, limits: bool) -> Tensor:
    """Float64 [s, v] of transformers, each piece on its own."""
    with torch.no_grad():
        found = [model(piece[None]).logits[0] for piece in pieces(tokens, limits)]
    return torch.cat(found).double().log_softmax(-1)


def cross_entropy(model: Any, sequence: Any, limits: bool) -> float:
    """Mean over a sequence's tokens."""
    whole = torch.from_numpy(sequence).long()
    log = log_probabilities(model, whole[:-1], limits)
    return float(-log.gather(-1, whole[1:, None]).mean())


def nats(toys: Toys, sequence: Any, limits: bool) -> tuple[float, float]:
    """Means over a sequence's tokens: KL(teacher || student) and the student's cross-entropy."""
    tokens = torch.from_numpy(sequence[:-1]).long()
    ours, theirs = (log_probabilities(m, tokens, limits) for m in (toys.student, toys.teacher))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return float(kl), cross_entropy(toys.student, sequence, limits)


LIMITS = ["data.reset_attention_mask=true", "data.reset_position_ids=true"]


@pytest.mark.parametrize("limits", [True, False])
def test_distillation_is_transformers_on_the_documents(run_on_ranks: Any, toys: Toys, limits: bool) -> None:
    """The first step's losses of student and teacher, and the student's loss on held-out text; what a document loses
    by what it does not see can be told from what it loses by seeing it."""
    run_dir = toys.home / f"distilled-{limits}"
    made = toys.overrides(run_dir.name, f"student={toys.nemo['student']}", f"teacher={toys.nemo['teacher']}")
    made += ["distill.max_steps=1", "distill.global_batch_size=1", "distill.limit_val_batches=1"]
    made += ["distill.optim.warmup_steps=0", *(LIMITS if limits else [])]
    (result,) = run_on_ranks(1, sessions.distilled_under, made, {"micro_batch_size": 1}, timeout=PATIENCE_S)
    lines = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    (step,) = (line for line in lines if line["split"] == "train")
    train = toys.stream("train", whole_pass=False)
    kl, own = nats(toys, train.item(0), limits)
    assert math.isclose(step["kl"], kl, rel_tol=1e-4)
    assert math.isclose(step["lm_loss"], own, rel_tol=1e-4)
    assert step["tokens"] == SEQ_LENGTH
    valid = toys.stream("valid", whole_pass=True)
    losses = [nats(toys, valid.item(n), limits)[1] for n in range(len(valid))]
    assert math.isclose(result["lm_loss_nats_before"], sum(losses) / len(losses), rel_tol=1e-4)
    others = nats(toys, train.item(0), not limits)
    assert abs(others[0] - kl) > 1e-2
    assert abs(others[1] - own) > 1e-2


def test_documents_begin_as_the_tokenizer_begins_them(run_on_ranks: Any, toys: Toys) -> None:
    """Also in questions, whose losses and the importance are transformers' for the same tokens."""
    from transformers import AutoTokenizer

    made = toys.overrides("pruned", f"source={toys.nemo['teacher']}", "+prune.ffn_hidden_size=24")
    made += ["+prune.calibration_samples=2", f"+prune.task_file={toys.home}/task.jsonl", *LIMITS]
    question = {"question": "w5 w9", "choices": ["w7", "w8 w3"], "answer": 0}
    (toys.home / "task.jsonl").write_text(json.dumps(question) + "\n")
    (found,) = run_on_ranks(1, examined, made, timeout=PATIENCE_S)
    tokenizer = AutoTokenizer.from_pretrained(toys.home / "teacher")
    texts = [json.loads(line)["text"] for line in (toys.home / "train.jsonl").read_text().splitlines()]
    stored = [document.tolist() for document in documents(toys.prefix("train"))]
    assert stored == [[*tokenizer(text)["input_ids"], EOD] for text in texts]
    assert {ids[0] for ids in stored} == {BOS}
    for choice, loss in zip(question["choices"], found["losses"], strict=True):
        ids = torch.tensor(tokenizer(f"w5 w9 {choice}")["input_ids"])
        log = log_probabilities(toys.teacher, ids, limits=False)[2:-1]
        assert math.isclose(loss, -float(log.gather(-1, ids[3:, None]).sum()), rel_tol=1e-4)
    stream = toys.stream("train", whole_pass=True)
    bare = copy.deepcopy(toys.teacher)
    del bare.model.layers[0]
    for model, loss in zip((toys.teacher, bare), found["without"], strict=True):
        nats = [cross_entropy(model, stream.item(n), limits=True) for n in range(2)]
        assert math.isclose(loss, sum(nats) / 2, rel_tol=1e-4)
    expected = ffn_scores(toys.teacher, [torch.from_numpy(stream.item(n)[:-1]).long() for n in range(2)])
    torch.testing.assert_close(found["scores"].double(), expected, rtol=1e-4, atol=1e-6)


def ffn_scores(model: Any, sequences: list[Tensor]) -> Tensor:
    """L2 over samples of the mean magnitude over tokens (arXiv 2407.14679), documents on their own, [layers, f]."""
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0][0].double().abs())
        )
        for layer in model.model.layers
    ]
    count, means = len(hooks), []
    for tokens in sequences:
        seen.clear()
        log_probabilities(model, tokens, limits=True)
        means.append(torch.stack([torch.cat(seen[n::count]).mean(0) for n in range(count)]))
    for hook in hooks:
        hook.remove()
    return torch.stack(means).square().sum(0).sqrt()


def examined(overrides: list[str]) -> dict[str, Any]:
    """Scores and losses of the questions' choices as recipes/prune.py takes them."""
    from hydra import compose, initialize_config_dir

    from nemo_minitron.config.recipes import PruneRecipe, parse
    from nemo_minitron.evaluation.layer_removal import lm_loss_without
    from nemo_minitron.evaluation.multiple_choice import choice_losses
    from nemo_minitron.workflows.prune import scoring
    from nemo_minitron.workflows.prune.check import check
    from tests.support.ranks import ROOT, layout

    layout()
    with sessions._launched(), initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        r = parse(PruneRecipe, compose("prune", overrides=overrides))
        ready = check(r)
    session = sessions.open_session(ready.source.path)
    scores = scoring.score(
        session, r, ready.data, ready.task, gone=[0], choose_layers=False, source_sha256=""
    )
    losses = choice_losses(session.chunks, ready.task, micro_batch_size=1)[0]
    dataset = session.dataset(ready.data, r.data, "train")
    without = lm_loss_without(session.chunks, dataset, 2, [(0, 1)], micro_batch_size=2)
    found = {"scores": scores.tensors["ffn_hidden_size"], "losses": losses.tolist()}
    return found | {"without": without.tolist()}
