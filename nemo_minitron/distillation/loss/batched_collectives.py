"""Parts of one loss that need the other tensor-parallel ranks at the same points: one collective serves them all."""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from nemo_minitron import parallel

# A part yields what it needs reduced over the ranks ("max" or "sum": [k, n] for n tokens, answered alike; "gather":
# any shape, answered [tp, ...]) and goes on with the answer.
Request = tuple[str, Tensor]
Reductions = Generator[Request, Tensor, None]
Reduce = Callable[[list[Request]], list[Tensor]]


def run_in_step(parts: Sequence[Reductions], reduce: Reduce) -> None:
    """Advance all parts, in their order, to their next requests, answer these together, and so on to the end."""
    waiting: list[tuple[Reductions, Tensor | None]] = [(part, None) for part in parts]
    while waiting:
        asking: list[Reductions] = []
        requests: list[Request] = []
        for part, answer in waiting:
            try:
                requests.append(next(part) if answer is None else part.send(answer))
            except StopIteration:
                continue
            asking.append(part)
        waiting = list(zip(asking, reduce(requests), strict=True))


def reduce_nothing(requests: list[Request]) -> list[Tensor]:
    """The answers where there is one rank, or where all ranks hold the same."""
    return [t[None] if op == "gather" else t for op, t in requests]


def reduce_over_tp(requests: list[Request]) -> list[Tensor]:
    """The answers over the tensor-parallel ranks, with at most one collective for each kind of request."""
    if parallel.tp_size() == 1:
        return reduce_nothing(requests)
    answers: dict[int, Tensor] = {}
    for op in ("max", "sum"):
        mine = [(place, t) for place, (kind, t) in enumerate(requests) if kind == op]
        if mine:
            joined = parallel.all_reduce(torch.cat([t for _, t in mine]), "tp", op)  # type: ignore[arg-type]
            parts = joined.split([t.shape[0] for _, t in mine])
            answers.update((place, part) for (place, _), part in zip(mine, parts, strict=True))
    for place, (kind, t) in enumerate(requests):
        if kind == "gather":
            answers[place] = torch.stack(parallel.all_gather_tp(t))
    return [answers[place] for place in range(len(requests))]
