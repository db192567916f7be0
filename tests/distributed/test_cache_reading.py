"""The most probable tokens of a sharded vocabulary, and losses on a cache under tensor parallelism, against float64."""

from dataclasses import replace
from pathlib import Path

import torch

from nemo_minitron import parallel
from nemo_minitron.distillation import LossSettings, distillation_loss
from nemo_minitron.distillation.cache.reader import CACHE, TeacherCache
from nemo_minitron.distillation.cache.top_k_logits import most_probable
from nemo_minitron.distillation.cache.writer import CachePlan
from tests.support.cached_teachers import random_cache
from tests.support.kd_problems import Problem, close, expected, problem
from tests.support.ranks import layout

TOKENS = torch.arange(24).view(3, 8)


def most_probable_tokens() -> None:
    layout(tp=2)
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(30, 5, generator=g), torch.randn(16, 5, generator=g) * 3
    # Fewer than a rank has, more than that, and all; of a vocabulary that fills the ranks, and of one that does not.
    for k, vocab_size in ((3, 16), (11, 16), (16, 16), (3, 13), (13, 13), (5, 7)):
        mine = head.chunk(2)[parallel.tp_rank()]
        found = most_probable(hidden, mine, k, 1.7, vocab_size=vocab_size, chunk_bytes=4 * 8 * 7)
        logits = hidden.double() @ head[:vocab_size].double().T
        values, indices = logits.topk(k)
        assert torch.equal(found["indices"].long(), indices)
        torch.testing.assert_close(found["values"].double(), values - values[:, :1], rtol=0, atol=2e-5)
        rest = ((logits.scatter(1, indices, -torch.inf) - values[:, :1]) / 1.7).logsumexp(1)
        torch.testing.assert_close(found["tail_logsumexp"].double(), rest, rtol=0, atol=2e-5)


def test_most_probable_tokens(run_on_ranks):
    run_on_ranks(2, most_probable_tokens)


def write(p: Problem, directory: Path, form: str, loss: LossSettings) -> TeacherCache:
    """A cache of the problem's teacher; its three sequences are called `TOKENS`."""
    contents = replace(
        random_cache(directory, form).plan.contents,
        hidden_size=p.teacher_head.shape[1],
        vocab_size=len(p.teacher_head) if form == "hidden" else p.vocab_size,
        seq_length=8,
        samples={"train": 2, "valid": 1},
        top_k=None if form == "hidden" else loss.top_k,
        temperature=None if form == "hidden" else loss.temperature,
    )
    plan = CachePlan(directory / CACHE, contents, 2, contents.samples)
    plan.begin()
    if form == "hidden":
        held = {"hidden": p.teacher_hidden}
        plan.write_head(p.teacher_head)
    else:
        top = p.cached(loss, loss.top_k)
        largest = top.values[..., :1]
        tail = top.tail_logsumexp - largest[..., 0] / loss.temperature
        held = {"values": top.values - largest, "indices": top.indices, "tail_logsumexp": tail}
    for number, rows in enumerate(plan.shards):
        part = slice(rows.start, rows.stop)
        plan.write_shard(number, TOKENS[part], {name: t.transpose(0, 1)[part] for name, t in held.items()})
    plan.finish(1.0)
    return TeacherCache(directory)


def losses(directory: str) -> None:
    """Heads padded differently, so that the teacher's rows are cut elsewhere; the batch in another order."""
    from nemo_minitron.nemo.teacher_targets import CachedTeacher

    order = torch.tensor([2, 0, 1])
    p = problem(s=8, padded=56, teacher_padded=64).to(torch.float32)
    for number, (form, loss) in enumerate(
        [
            ("hidden", LossSettings()),
            ("hidden", LossSettings("reverse_kl", temperature=2.0, top_k=5, ce_weight=1.0)),
            ("top_k", LossSettings(temperature=2.0, top_k=5)),
            ("top_k", LossSettings("jensen_shannon", top_k=9, tail=False)),
        ]
    ):
        wanted = expected(p, loss)
        for sp in (False, True):
            layout(tp=2, sp=sp)
            place = Path(directory) / f"{number}-{sp}"
            if parallel.tp_rank() == 0:
                write(p, place, form, loss)
            parallel.barrier()
            head = p.head.chunk(2)[parallel.tp_rank()].clone()
            hidden = p.hidden[:, order]
            mine = hidden.chunk(2)[parallel.tp_rank()] if sp else hidden
            mine = mine.clone().requires_grad_()
            teacher = CachedTeacher(TeacherCache(place), loss, len(head), p.vocab_size, head.device)
            sums = distillation_loss(
                mine,
                head.requires_grad_(),
                teacher.target(TOKENS[order]),
                p.mask[order],
                loss,
                vocab_size=p.vocab_size,
                labels=p.labels[order],
            )
            sums.loss.backward()
            close(sums.kd, wanted.kd, 1e-5)
            gradient = wanted.hidden[:, order]
            close(mine.grad, gradient.chunk(2)[parallel.tp_rank()] if sp else gradient, 1e-5)
            close(head.grad, wanted.head.chunk(2)[parallel.tp_rank()], 1e-5)


def test_losses_on_a_cache(run_on_ranks, tmp_path):
    run_on_ranks(2, losses, str(tmp_path))
