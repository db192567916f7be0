"""The collectives on two and four ranks, and that they do nothing where there is one."""

from collections.abc import Sequence

import torch

from nemo_minitron import parallel
from nemo_minitron.merging.evolution import one_a_worker
from tests.support.ranks import layout


def test_nothing_happens_where_nothing_is_initialised():
    t = torch.arange(3.0)
    assert [parallel.group_size(g) for g in ("tp", "pp", "dp", "cp")] == [1, 1, 1, 1]
    assert parallel.tp_rank() == parallel.pp_rank() == parallel.dp_rank() == parallel.cp_rank() == 0
    assert parallel.all_reduce(t, "tp") is t
    assert parallel.broadcast_pp(t, 0) is t
    assert parallel.gather_over_pp("x") == ["x"]
    assert [parallel.true_everywhere(torch.tensor(holds)) for holds in (True, False)] == [True, False]
    [same] = parallel.exchange_tp([t])
    assert same is t
    parallel.exchange_pp([], [])
    for function in (
        parallel.gather_sequence,
        parallel.reduce_scatter_sequence,
        parallel.sum_tp,
        parallel.copy_tp,
    ):
        assert function(t) is t


def exchange() -> None:
    layout(tp=4)
    me = parallel.tp_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        # Rank r sends to rank q: r rows for even q, none for odd q, each row saying (r, q).
        send = [
            torch.tensor([[me, q]] * (me if q % 2 == 0 else 0), dtype=dtype).view(-1, 2) for q in range(4)
        ]
        received = parallel.exchange_tp(send)
        for r, t in enumerate(received):
            assert t.dtype == dtype
            assert t.tolist() == [[r, me]] * (r if me % 2 == 0 else 0)


def test_uneven_exchange(run_on_ranks):
    run_on_ranks(4, exchange)


def reductions() -> None:
    layout(tp=2, pp=2)
    tp, pp = parallel.tp_rank(), parallel.pp_rank()
    one = torch.tensor([float(tp), float(pp)])
    assert parallel.all_reduce(one.clone(), "tp").tolist() == [1.0, 2.0 * pp]
    assert parallel.all_reduce(one.clone(), "pp", "max").tolist() == [float(tp), 1.0]
    assert parallel.all_reduce(one.clone(), "tp", "min").tolist() == [0.0, float(pp)]
    assert [t.tolist() for t in parallel.all_gather_tp(one)] == [[0.0, pp], [1.0, pp]]
    assert parallel.gather_over_pp((tp, pp)) == [(tp, 0), (tp, 1)]
    assert parallel.broadcast_pp(one.clone(), 1).tolist() == [tp, 1.0]


def one_each() -> list[float]:
    """Three candidates on two workers, each the mean over a worker's two stages."""
    layout(pp=2)

    def loss(vector: Sequence[float]) -> float:
        assert parallel.dp_size() == 1
        return float(parallel.all_reduce(torch.tensor(vector[0] + parallel.pp_rank()), "pp"))

    measure = one_a_worker(loss)
    assert parallel.dp_size() == 2
    return [*measure([[1.0], [2.0]]), *measure([[3.0]])]


def test_workers_measure_a_candidate_each(run_on_ranks):
    assert run_on_ranks(4, one_each) == [[3.0, 5.0, 7.0]] * 4


def test_groups_are_megatrons(run_on_ranks):
    run_on_ranks(4, reductions)


def one_says_no() -> list[bool]:
    here = layout(tp=2)
    said = [torch.tensor(True), torch.tensor(parallel.dp_rank() * here.tp + parallel.tp_rank() != 3)]
    return [parallel.true_everywhere(holds) for holds in said]


def test_true_everywhere_asks_all_ranks(run_on_ranks):
    assert run_on_ranks(4, one_says_no) == [[True, False]] * 4


def sequence_parts_and_gradients() -> None:
    layout(tp=2)
    me = parallel.tp_rank()
    assert parallel.gather_sequence(torch.tensor([[me, 7]])).tolist() == [[0, 7], [1, 7]]
    whole = torch.arange(8.0).view(4, 2) * (me + 1)
    assert (
        parallel.reduce_scatter_sequence(whole).tolist()
        == [
            [[0.0, 3.0], [6.0, 9.0]],
            [[12.0, 15.0], [18.0, 21.0]],
        ][me]
    )
    for transposed in (False, True):
        t = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        t = (t.t() if transposed else t).requires_grad_()
        weight = torch.full((2, 2), me + 1.0)
        weight = weight.t() if transposed else weight
        total = parallel.sum_tp(t * weight)
        assert torch.equal(total, 3 * t)
        assert torch.equal(torch.autograd.grad(total.sum(), t)[0], weight)
        # Where ranks go on differently, each one's gradient is a part.
        assert torch.equal(
            torch.autograd.grad((parallel.copy_tp(t) * weight).sum(), t)[0], torch.full((2, 2), 3.0)
        )


def test_sequence_parts_and_gradients(run_on_ranks):
    run_on_ranks(2, sequence_parts_and_gradients)


def stages() -> None:
    layout(pp=4)
    me = parallel.pp_rank()
    # Every stage sends two tensors to stage 0; their order is kept.
    if me:
        parallel.exchange_pp([(0, torch.full((me,), 10.0 + k)) for k in range(2)], [])
    else:
        buffers = [(stage, torch.empty(stage)) for stage in (1, 2, 3) for _ in range(2)]
        parallel.exchange_pp([], buffers)
        assert [t.tolist() for _, t in buffers] == [[10.0 + k] * s for s in (1, 2, 3) for k in range(2)]
    # Both directions in one batch.
    other, got = me ^ 1, torch.empty(1)
    parallel.exchange_pp([(other, torch.tensor([float(me)]))], [(other, got)])
    assert int(got) == other


def test_moves_between_stages(run_on_ranks):
    run_on_ranks(4, stages)


def relay() -> list[int]:
    layout(pp=2, tp=2)
    line, seen = parallel.PipelineRelay(), []
    for number in range(3):
        if parallel.pp_rank() == 0:
            line.send(torch.tensor([10 * number + parallel.tp_rank()]))
        else:
            seen.append(int(line.receive(torch.empty(1, dtype=torch.int64))))
    line.close()
    return seen


def test_relay_keeps_order_and_pipelines_apart(run_on_ranks):
    assert run_on_ranks(4, relay) == [[], [], [0, 10, 20], [1, 11, 21]]
