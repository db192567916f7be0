"""MT-Bench's judge: a server on this machine that answers well, badly, or not at all."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.evaluation import JudgeConfig
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import judged, packages
from nemo_minitron.evaluation.benchmarks.judged import Question

QUESTIONS = [
    Question(81, "writing", ["Write {a} verse.", "Again."], None),
    Question(111, "math", ["What is 6 * 7?", "And 6 * 8?"], ["42", "48"]),
    Question(96, "roleplay", ["You are a cat.", "Purr."], None),
]
ANSWERS = {81: ["one {b}", "two"], 111: ["42", "47"], 96: ["", "prr"]}


class Judge(http.server.BaseHTTPRequestHandler):
    """Says what the server's list holds, in turn; an integer is an HTTP status."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.heard.append((self.path, self.headers.get("Authorization"), body))
        said = server.says.pop(0) if len(server.says) > 1 else server.says[0]
        self.send_response(said if isinstance(said, int) else 200)
        self.end_headers()
        if isinstance(said, str):
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = http.server.ThreadingHTTPServer(("localhost", 0), Judge)
    made.heard, made.says = [], ["Rating: [[7]]"]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Prompts of the package's form."""
    monkeypatch.setattr(judged, "_WAIT_S", 0.01)
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    file = packages.place(packages.JUDGED, config) / judged._DIRECTORY / "judge_prompts.jsonl"
    file.parent.mkdir(parents=True)
    one = "[Question] {question} [Answer] {answer}"
    two = "{question_1} {answer_1} {question_2} {answer_2}"
    prompts = {
        "single-v1": one,
        "single-math-v1": one + " [Right] {ref_answer_1}",
        "single-v1-multi-turn": two,
        "single-math-v1-multi-turn": two + " {ref_answer_1} {ref_answer_2}",
    }
    rows = [{"name": n, "system_prompt": "Judge.", "prompt_template": t} for n, t in prompts.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def judge_at(server: Any, **changes: Any) -> JudgeConfig:
    url = f"http://localhost:{server.server_address[1]}/v1"
    return JudgeConfig(
        **{"url": url, "model": "m", "parallel": 1, "attempts": 2, "timeout_s": 5.0, **changes}
    )


def test_each_turn_is_rated_with_what_it_needs(server: Any, data: DataConfig, tmp_path: Path) -> None:
    server.says = ["[[8]]", "I think [[6.5]] of 10", "[[3]]", "[2]", "[[10]]", "[[1]]"]
    file = tmp_path / "judgements.jsonl"
    found = judged.rated(QUESTIONS, ANSWERS, judge_at(server), "secret", data, file)
    expected = {(81, 0): 8, (81, 1): 6.5, (111, 0): 3, (111, 1): 2, (96, 0): 10, (96, 1): 1}
    assert found.found == expected
    assert not found.unscored
    path, key, body = server.heard[3]
    assert (path, key, body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer secret",
        "m",
        0,
    )
    assert body["messages"][0] == {"role": "system", "content": "Judge."}
    assert body["messages"][1]["content"] == "What is 6 * 7? 42 And 6 * 8? 47 42 48"
    assert server.heard[0][2]["messages"][1]["content"] == "[Question] Write {a} verse. [Answer] one {b}"
    means = judged.means(QUESTIONS, found)
    assert means["rating"][0] == pytest.approx((7.25 + 2.5 + 5.5) / 3)
    assert means["rating, turn 1"][0] == 7
    assert means["rating, roleplay"] == (5.5, None, 1)
    # What was rated is not asked again.
    server.says = ["[[1]]"]
    assert judged.rated(QUESTIONS, ANSWERS, judge_at(server), None, data, file).found == expected
    assert len(server.heard) == 6


def test_a_judge_that_talks_nonsense_is_asked_again_and_then_listed(
    server: Any, data: DataConfig, tmp_path: Path
) -> None:
    server.says = ["Good!", "[[9]]", "[[11]]", "Rating: ten", 500, "[[4]]", "[[5]]"]
    found = judged.rated(QUESTIONS, ANSWERS, judge_at(server), None, data, tmp_path / "j.jsonl")
    assert found.found == {(81, 0): 9, (111, 0): 4, (111, 1): 5, (96, 0): 5, (96, 1): 5}
    assert list(found.unscored) == [(81, 1)]
    assert "no rating from 1 to 10" in found.unscored[81, 1]


def test_a_judge_that_is_not_there_is_given_up(server: Any, data: DataConfig, tmp_path: Path) -> None:
    server.says = [503]
    found = judged.rated(QUESTIONS, ANSWERS, judge_at(server), None, data, tmp_path / "j.jsonl")
    assert not found.found
    assert len(found.unscored) == 6
    assert "503" in found.unscored[81, 0]
    assert "stopped answering" in found.unscored[96, 1]
    assert len(server.heard) == 3 * 2
    assert judged.means(QUESTIONS, found) == {}


def test_a_judge_without_an_address_is_refused() -> None:
    for judge, part in (
        (JudgeConfig(), "eval.judge.url"),
        (JudgeConfig(url="http://x/v1"), "eval.judge.model"),
        (JudgeConfig(url="ftp://x", model="m"), "eval.judge.url=ftp://x"),
    ):
        with pytest.raises(InputError, match=part):
            judged.check_judge(judge)


def test_the_second_turn_is_asked_after_the_first_answer() -> None:
    heard: list[Any] = []

    def answer(talks: list[list[dict[str, str]]]) -> list[str]:
        heard.append([[m["content"] for m in talk] for talk in talks])
        return [f"a{len(heard)}{i}" for i in range(len(talks))]

    found = judged.answered(QUESTIONS[:2], answer)
    assert found == {81: ["a10", "a20"], 111: ["a11", "a21"]}
    assert heard[1][0] == ["Write {a} verse.", "a10", "Again."]
