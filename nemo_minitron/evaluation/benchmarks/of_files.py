"""Benchmarks whose items are in a file that the user names: `xlsum=FILE`, `chatrag=FILE`, `mbpp=FILE`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import code
from nemo_minitron.evaluation.benchmarks.items import records, written

_MEAN = {"aggregation": "mean", "higher_is_better": True}
_ROUGE = ("rouge1", "rouge2", "rougeL")
# As many documents and turns as ChatRAG Bench gives its models (arXiv 2401.10225).
_DOCUMENTS, _TURNS = 5, 7
_SYSTEM = (
    "System: This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions based on the context. The assistant should also indicate "
    "when the answer cannot be found in the context."
)


@dataclass(frozen=True)
class OfFile:
    """`config`: the harness's task of a file, or of the hub where `on_hub`; `runs_code`: it runs what was written."""

    config: Callable[[str | None], dict[str, Any]]
    on_hub: bool = False
    runs_code: bool = False


def xlsum(file: str | None) -> dict[str, Any]:
    """Summaries of news, rated by ROUGE's F measures (rouge_score@0.1.2, which knows English word stems only).

    Args:
        file: records with `text` and `summary`, as XL-Sum's archives hold them (arXiv 2106.13822): no loading script.

    Raises:
        InputError: a bad line.
    """
    assert file is not None
    items = [
        {"prompt": f"Article: {row['text']}\n\nSummary:", "summary": row["summary"]}
        for row in records(file, lambda row, where: _check_texts(row, where, "text", "summary"))
    ]
    task = written(items, 96, _rouge, [{"metric": name, **_MEAN} for name in reversed(_ROUGE)])
    task["generation_kwargs"]["until"] = ["\n"]
    return task


def _rouge(item: dict[str, Any], answer: str) -> dict[str, float]:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(_ROUGE, use_stemmer=True)
    found = scorer.score(item["summary"], answer)
    return {name: float(found[name].fmeasure) for name in reversed(_ROUGE)}


def chatrag(file: str | None) -> dict[str, Any]:
    """Answers to the last question of a conversation about documents: the F1 of the words, the best of the references.

    Args:
        file: records with `messages` (the last is the user's), `ctxs` (documents with `text` and perhaps `title`, the
            best first) and `answers`, as ChatRAG Bench's files hold them.

    Raises:
        InputError: a bad line.
    """
    assert file is not None
    items = [{"prompt": _asked(row), "answers": row["answers"]} for row in records(file, _check_documents)]
    task = written(items, 64, _best, [{"metric": "f1", **_MEAN}])
    task["generation_kwargs"]["until"] = ["\nUser:"]
    return task


def _asked(row: dict[str, Any]) -> str:
    documents = [
        f"title: {found.get('title') or ''}, source: {found['text']}" for found in row["ctxs"][:_DOCUMENTS]
    ]
    names = {"user": "User", "assistant": "Assistant"}
    turns = [f"{names[turn['role']]}: {turn['content']}" for turn in row["messages"][-_TURNS:]]
    return "\n\n".join([_SYSTEM, *documents, *turns, "Assistant:"])


def _best(item: dict[str, Any], answer: str) -> dict[str, float]:
    from transformers.data.metrics.squad_metrics import compute_f1

    return {"f1": max(float(compute_f1(reference, answer)) for reference in item["answers"])}


def _check_texts(row: dict[str, Any], where: str, *keys: str) -> None:
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f"{where}: {key}: must be a string that is not blank")


def _check_documents(row: dict[str, Any], where: str) -> None:
    turns, documents, answers = row.get("messages"), row.get("ctxs"), row.get("answers")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: messages: must be a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ("user", "assistant"):
            raise InputError(f"{where}: messages: each must have the role user or assistant")
        _check_texts(turn, f"{where}: messages", "content")
    if turns[-1]["role"] != "user":
        raise InputError(f"{where}: messages: the last must be the user's")
    if not isinstance(documents, list) or not documents or not all(isinstance(d, dict) for d in documents):
        raise InputError(f"{where}: ctxs: must be a list of documents with text")
    for document in documents:
        _check_texts(document, f"{where}: ctxs", "text")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise InputError(f"{where}: answers: must be a list of strings")


OF_FILES = {
    "mbpp": OfFile(code.config, on_hub=True, runs_code=True),
    "xlsum": OfFile(xlsum),
    "chatrag": OfFile(chatrag),
}
