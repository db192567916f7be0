"""The student that recipes/prune.py saved, opened under other layouts, and held against its teacher's own weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.functional.conftest import Pruned, Teacher
from tests.support import ranks, sessions
from tests.support.commands import SEQ_LENGTH, VOCAB_SIZE

PATIENCE_S = 240


def cut(teacher: Path, plan: dict[str, Any]) -> Any:
    """The student as transformers' LlamaForCausalLM, made of the teacher's export by plain indexing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = LlamaForCausalLM.from_pretrained(teacher)
    target = plan["target"]
    config = LlamaConfig.from_pretrained(
        teacher, hidden_size=target["hidden_size"], intermediate_size=target["ffn_hidden_size"]
    )
    hidden = torch.tensor(plan["kept"]["hidden_size"])
    neurons = [torch.tensor(kept) for kept in plan["kept"]["ffn_hidden_size"]]
    thin = {}
    for name, weight in source.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if "gate_proj" in name or "up_proj" in name:
            weight = weight[neurons[layer]]
        elif "down_proj" in name:
            weight = weight[:, neurons[layer]]
        writes = any(part in name for part in ("o_proj", "down_proj", "norm"))
        thin[name] = weight[hidden] if writes else weight[:, hidden]
    student = LlamaForCausalLM(config)
    student.load_state_dict(thin)
    return student.eval()


@pytest.fixture(scope="module")
def expected(teacher: Teacher, pruned: Pruned) -> tuple[torch.Tensor, float]:
    """Tokens [n, s + 1], and the loss on them in nats that the plan should give."""
    student = cut(teacher.huggingface, json.loads((pruned.run_dir / "plan.json").read_text()))
    tokens = torch.randint(VOCAB_SIZE, (4, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = student(tokens[:, :-1]).logits
    return tokens, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["tp1", "tp2", "pp2"],
)
def test_the_student_under_each_layout(
    pruned: Pruned, expected: tuple[torch.Tensor, float], sizes: dict[str, int]
) -> None:
    tokens, loss = expected
    size = 2 if sizes else 1
    losses = ranks.run_on_ranks(
        size, sessions.loss_under, str(pruned.run_dir), tokens, sizes, timeout=PATIENCE_S
    )
    assert losses == pytest.approx([loss] * size, rel=1e-4)
