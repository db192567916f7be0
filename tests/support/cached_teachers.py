"""Caches of random teachers, written as the recipe writes them, and what they were made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.cache.format import Contents
from nemo_minitron.distillation.cache.reader import CACHE
from nemo_minitron.distillation.cache.writer import CachePlan

S, H, V, K = 6, 5, 40, 7


@dataclass
class Random:
    """tokens [n, s]; hidden [n, s, h], head [v, h] and logits [n, s, v], float32."""

    tokens: Tensor
    hidden: Tensor
    head: Tensor
    plan: CachePlan

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.head.T

    def tensors(self, rows: range) -> dict[str, Tensor]:
        """What a shard of these sequences holds, by plain torch."""
        part = slice(rows.start, rows.stop)
        if self.plan.contents.form == "hidden":
            return {"hidden": self.hidden[part]}
        logits, temperature = self.logits[part].double(), self.plan.contents.temperature
        values, indices = logits.topk(self.plan.contents.top_k or 0)
        rest = logits.scatter(-1, indices, -torch.inf) - values[..., :1]
        return {
            "values": values - values[..., :1],
            "indices": indices,
            "tail_logsumexp": (rest / temperature).logsumexp(-1),
        }

    def write(self, *numbers: int) -> None:
        """Some shards, or all, the output layer and the manifest."""
        self.plan.begin()
        shards = self.plan.shards
        for number in numbers or range(len(shards)):
            rows = shards[number]
            self.plan.write_shard(number, self.tokens[rows.start : rows.stop], self.tensors(rows))
        if not numbers:
            if self.plan.contents.form == "hidden":
                self.plan.write_head(self.head)
            self.plan.finish(2.5)


def random_cache(run_dir: Path, form: str, **changes: Any) -> Random:
    """Ten sequences in shards of four, not yet written."""
    g = torch.Generator().manual_seed(3)
    fields: dict[str, Any] = {
        "form": form,
        "dtype": "float32",
        "teacher": "somewhere",
        "teacher_sha256": ("a", "b"),
        "hidden_size": H,
        "vocab_size": V,
        "vocabulary_sha256": "c",
        "data": "files",
        "data_sha256": "d",
        "data_seed": 1,
        "seq_length": S,
        "samples": {"train": 8, "valid": 2},
        "top_k": K if form == "top_k" else None,
        "temperature": 2.0 if form == "top_k" else None,
    }
    plan = CachePlan(run_dir / CACHE, Contents(**fields | changes), 4, {"train": 8, "valid": 2})
    tokens = torch.randint(0, V, (10, S), generator=g)
    hidden, head = torch.randn(10, S, H, generator=g), torch.randn(V, H, generator=g)
    return Random(tokens, hidden, head, plan)
