"""Small conversations and preference pairs, and what transformers says of them: the reference of the alignment tests.

Which tokens are answers is taken from transformers' own reading of the template's {% generation %} blocks.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WORDS = ("from", "import", "return", "self", "None", "class")


def sample(number: int) -> list[dict[str, str]]:
    """One or two exchanges, some with a system message."""
    messages = [{"role": "system", "content": "Repeat it."}] if number % 3 == 0 else []
    for turn in range(1 + number % 2):
        word = WORDS[(number + turn) % len(WORDS)]
        messages += [
            {"role": "user", "content": f"{word} {number}"},
            {"role": "assistant", "content": f"{word} {word}" if turn else word},
        ]
    return messages


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path: Path, numbers: range) -> Path:
    return write(path, [{"messages": sample(n)} for n in numbers])


def pairs(path: Path, numbers: range) -> Path:
    rows = []
    for n in numbers:
        *prompt, answer = sample(n)
        rows.append(
            {
                "messages": prompt,
                "chosen": answer["content"],
                "rejected": f"{WORDS[n % 5 + 1]} pass",
                "chosen_reward": 1.0,
                "rejected_reward": 0.1 * (n % 4),
            }
        )
    return write(path, rows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _answer_log_probs(model: Any, tokenizer: Any, messages: list[dict[str, str]], only_last: bool) -> Tensor:
    """Log-probabilities in nats of the answers' tokens."""
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    ids = torch.tensor(encoded["input_ids"])
    mask = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    if only_last:
        mask[: int(torch.nonzero(~mask)[-1])] = False
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0].double()
    return -F.cross_entropy(logits, ids[1:], reduction="none")[mask[1:]]


def sft_loss(model: Any, tokenizer: Any, path: Path) -> float:
    """Nats a token, averaged over each sample's answers and then over the samples."""
    losses = [
        -_answer_log_probs(model, tokenizer, row["messages"], False).mean().item() for row in rows_of(path)
    ]
    return sum(losses) / len(losses)


def greedy_answers(model: Any, tokenizer: Any, path: Path, longest: int) -> list[dict[str, str]]:
    """What `generate` writes after each sample's last prompt, up to the end-of-text token."""
    found = []
    for row in rows_of(path):
        *prompt, reference = row["messages"]
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens, mask = encoded["input_ids"], encoded["attention_mask"]
        written = model.generate(tokens, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        ids = tokens[0]
        found.append(
            {
                "prompt": tokenizer.decode(ids),
                "answer": tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True),
                "reference": reference["content"],
            }
        )
    return found


def rpo_bwd_kl(policy: Any, reference: Any, tokenizer: Any, path: Path, beta: float) -> float:
    """Mean over pairs of KL(rewards' || policy's preference), each a Bernoulli distribution (arXiv 2406.11704, 3.3)."""
    total = 0.0
    rows = rows_of(path)
    for row in rows:
        ratios = []
        for answer in (row["chosen"], row["rejected"]):
            messages = [*row["messages"], {"role": "assistant", "content": answer}]
            ours, theirs = (
                _answer_log_probs(model, tokenizer, messages, True).sum() for model in (policy, reference)
            )
            ratios.append(ours - theirs)
        wanted = torch.distributions.Bernoulli(
            logits=torch.tensor(row["chosen_reward"] - row["rejected_reward"]).double()
        )
        found = torch.distributions.Bernoulli(logits=beta * (ratios[0] - ratios[1]))
        total += torch.distributions.kl_divergence(wanted, found).item()
    return total / len(rows)
