"""recipes/chat.py on toys: transformers and llama.cpp say the same, streamed; what cannot be answered is refused."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.chat import ChatConfig, ChatRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.export import generation
from nemo_minitron.workflows.chat import check, engines, run
from tests.support.export_students import Student, arch_of, made

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    place = tmp_path_factory.mktemp("student")
    found = made(place, arch_of("llama"))
    found.written(place / "model.gguf", "F32")
    return found


@pytest.fixture
def gguf(student: Student) -> Path:
    return student.directory.parent / "model.gguf"


def asking(source: Path, prompt: str | None = "fox", **chat: Any) -> ChatRecipe:
    settings = {"max_new_tokens": 8, **chat}
    return ChatRecipe(run_dir=".", source=str(source), prompt=prompt, chat=ChatConfig(**settings))


def said(r: ChatRecipe, *messages: str) -> list[engines.Answer]:
    """The answers to one message after the other, in one conversation."""
    conversation, answers = check.first(asking(Path(r.source), None)), []
    with engines.opened(r, check.check(r)) as engine:
        for message in messages:
            pieces: list[str] = []
            conversation.append({"role": "user", "content": message})
            answers.append(engine.answer(conversation, pieces.append))
            conversation.append({"role": "assistant", "content": answers[-1].text})
            assert "".join(pieces) == answers[-1].text
    return answers


def test_transformers_and_llama_cpp_say_the_same(student: Student, gguf: Path) -> None:
    import torch

    messages = [{"role": "user", "content": "quick fox"}]
    ids = torch.tensor([student.tokenizer.apply_chat_template(messages, add_generation_prompt=True)])
    whole = student.transformers().generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    one, other = (said(asking(path), "quick fox", "lazy dog") for path in (student.directory, gguf))
    assert one[0].text == student.tokenizer.decode(whole, skip_special_tokens=True)
    assert [a.text for a in one] == [a.text for a in other]
    assert [a.tokens for a in one] == [a.tokens for a in other]
    assert [a.ended for a in one] == [a.ended for a in other]


def test_a_stop_token_ends_an_answer(student: Student, tmp_path: Path) -> None:
    """The second token that it would write, by the settings of the model's author."""
    import shutil

    import torch

    messages = [{"role": "user", "content": "fox"}]
    ids = torch.tensor([student.tokenizer.apply_chat_template(messages, add_generation_prompt=True)])
    new = student.transformers().generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[
        0, ids.shape[1] :
    ]
    stop = next(i for i, token in enumerate(new.tolist()) if i and token not in new[:i].tolist())
    shutil.copytree(student.directory, tmp_path / "hf")
    generation.write({"eos_token_id": [0, int(new[stop])]}, tmp_path / "hf")
    (answer,) = said(asking(tmp_path / "hf"), "fox")
    assert (answer.tokens, answer.ended) == (stop + 1, True)


def test_sampling_is_seeded(student: Student, gguf: Path) -> None:
    for path in (student.directory, gguf):
        texts = {said(asking(path, temperature=5.0, max_new_tokens=16), "fox")[0].text for _ in range(2)}
        assert len(texts) == 1
        assert texts != {said(asking(path, max_new_tokens=16), "fox")[0].text}


def test_messages_from_a_pipe(
    student: Student,
    gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"quick fox\n\nlazy\n{'fox ' * 400}\n/new\nlazy\n"))
    r = asking(gguf, None, system="jump")
    fields = run.run(r, check.check(r), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "conversation.jsonl").read_text().splitlines()]
    asked = [[m["content"] for m in row["messages"] if m["role"] != "assistant"] for row in rows]
    assert asked == [["jump", "quick fox"], ["jump", "quick fox", "lazy"], ["jump", "lazy"]]
    assert rows[1]["messages"][:3] == rows[0]["messages"]
    assert (fields["answers"], fields["engine"], fields["chat_template"]) == (3, "llama.cpp", True)
    printed = capsys.readouterr()
    assert rows[-1]["messages"][-1]["content"] in printed.out
    assert "/new begins a new conversation" in printed.err


# ---- refused -------------------------------------------------------------------------------------------------


def test_refused(student: Student, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:5000])
    for r, words in (
        (asking(gguf, " "), "prompt: is empty"),
        (asking(tmp_path / "two"), "holds 2 GGUF files"),
        (asking(tmp_path / "cut.gguf"), "cut.gguf"),
        (asking(tmp_path / "none"), "no such directory"),
        (asking(student.directory, "fox " * 400), "prompt: has .* tokens; the model was made for 128"),
        (asking(student.directory, "a<|im_end|>b"), "control token"),
    ):
        with pytest.raises(InputError, match=words):
            check.check(r)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package gguf"):
        check.check(asking(gguf))


def test_a_prompt_beyond_the_context_of_llama_cpp(gguf: Path) -> None:
    with pytest.raises(InputError, match="exceeds the available context size"):
        said(asking(gguf), "fox " * 400)


def test_what_a_run_exported_is_found(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(
        json.dumps({"recipe": "export", "exported": str(gguf.parent / "hf")})
    )
    assert check.check(asking(tmp_path)).source.path == gguf.parent / "hf"
