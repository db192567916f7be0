"""Cards, licences, Modelfiles, and a hub on loopback that takes what is published."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from nemo_minitron.errors import InputError
from nemo_minitron.export import card, consumers, hub, licences
from nemo_minitron.export.lineage import lineage
from nemo_minitron.export.modelfile import modelfile
from tests.support.stacked_weights import ARCH, of_family


def write_run(place: Path, result: dict[str, Any], command: str) -> Path:
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(result))
    (place / "config.yaml").write_text(
        f"# {command}\n# nemo_minitron 0.1.0\nsource: /home/me/base\nseed: 1\n"
    )
    return place


@pytest.fixture
def base(tmp_path: Path) -> Path:
    place = tmp_path / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "abc"
    place.mkdir(parents=True)
    (place / "README.md").write_text("---\nlicense: llama3.2\n---\n# Llama\n")
    (place / "LICENSE.txt").write_text("the agreement")
    (place / "config.json").write_text("{}")
    return place


@pytest.fixture
def distilled(tmp_path: Path, base: Path) -> Path:
    pruned = {"recipe": "prune", "source": str(base), "params_before": 2000, "lm_loss_nats_after": 3.5}
    write_run(tmp_path / "pruned", pruned, f"python recipes/prune.py source={base}")
    (tmp_path / "pruned" / "importance.png").write_bytes(b"png")
    done = {
        "recipe": "distill",
        "student": str(tmp_path / "pruned"),
        "tokens": 16384,
        "lm_loss_nats_after": 2.25,
    }
    return write_run(tmp_path / "distilled", done, "python recipes/distill.py student=/home/me/pruned")


def facts(run: Path, **changes: Any) -> card.Facts:
    came_from = lineage(run)
    values: dict[str, Any] = {
        "name": "Llama-student",
        "lineage": came_from,
        "licence": card.licence_of(None, came_from),
        "architecture": ARCH,
        "result": {"verify_max_difference": 1e-6, "verify_largest_logit": 20.0},
        "repository": "me/Llama-student",
        "file": None,
        "has_template": True,
        "picture": True,
    }
    return card.Facts(**{**values, **changes})


def test_a_corrected_teacher_hands_its_base_on(distilled: Path, base: Path) -> None:
    """The teacher of a correction is what it changed; that of a distillation is not."""
    corrected = {"recipe": "correct_teacher", "teacher": str(base), "steps": 4}
    place = write_run(
        distilled.parent / "corrected", corrected, f"python recipes/correct_teacher.py teacher={base}"
    )
    before, after = lineage(base), lineage(place)
    assert (after.base, after.licence, after.legal) == (before.base, before.licence, before.legal)
    assert after.licence == "llama3.2"
    assert [step.result["recipe"] for step in after.steps] == ["correct_teacher"]
    by_it = {"recipe": "distill", "student": str(distilled), "teacher": str(place)}
    found = lineage(write_run(distilled.parent / "again", by_it, "python recipes/distill.py"))
    assert [step.result["recipe"] for step in found.steps] == ["distill", "distill", "prune"]


def test_a_card_tells_where_a_model_comes_from(distilled: Path, base: Path) -> None:
    text = card.card(facts(distilled))
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.library_name) == (
        "llama3.2",
        "meta-llama/Llama-3.2-1B",
        "transformers",
    )
    assert "conversational" in data.tags
    for said in (
        "**Built with Llama**",
        "pruned by importance",
        "then distilled from its teacher",
        "| distill | tokens trained on | 16,384 |",
        "| prune | held-out LM loss after, nats a token | 3.5000 |",
        "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc.",
        "(importance.png)",
        "python recipes/prune.py source=abc\npython recipes/distill.py student=pruned",
        'from_pretrained("me/Llama-student"',
        "vllm serve me/Llama-student",
    ):
        assert said in text, said
    assert "/home/me" not in text
    assert str(base) not in text
    assert [file.name for file in lineage(distilled).legal] == ["LICENSE.txt"]


def test_the_example_of_a_card_runs(distilled: Path, tmp_path: Path) -> None:
    """As Python at least: it compiles, with and without a chat template."""
    for has_template in (True, False):
        text = card.card(facts(distilled, has_template=has_template))
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert ("apply_chat_template" in code) == has_template


def test_a_gguf_card(distilled: Path) -> None:
    result = {
        "quantization": "Q4_K_M",
        "perplexity": 14.5,
        "perplexity_f16": 12.5,
        "perplexity_tokens": 127,
        "rows_that_fit_no_block": 181,
        "rows_that_fit_no_block_first": {"blk.0.attn_k.weight": 576},
    }
    text = card.card(facts(distilled, file="model-Q4_K_M.gguf", result=result))
    assert "llama-cli -m model-Q4_K_M.gguf" in text
    assert "| export | perplexity, Q4_K_M (127 tokens, llama.cpp) | 14.5000 |" in text
    assert "181 matrices have rows that the blocks of Q4_K_M do not divide" in text


def test_a_model_of_one_s_own_has_no_licence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "teacher", {"recipe": "pretrain", "tokens": 5}, "python recipes/pretrain.py")
    text = card.card(facts(run, name="mine"))
    assert ModelCard(text).data.license is None
    assert "## Licence" not in text
    assert "trained from scratch" in text


def test_licences() -> None:
    nvidia = licences.of_name("NVIDIA Open Model License", "license=x")
    assert nvidia.name == "nvidia-open-model-license"
    assert nvidia.notice == "Licensed by NVIDIA Corporation under the NVIDIA Open Model License"
    assert licences.of_name("llama3.1", "").built_with == "Built with Llama"
    assert licences.of_name("llama3", "").built_with == "Built with Meta Llama 3"
    assert licences.of_name("Apache-2.0", "").notice is None
    for said, words in (("wtf", "license=wtf: is not known"), ("cc-by-nc-nd-4.0", "forbids changed copies")):
        with pytest.raises(InputError, match=words):
            licences.of_name(said, f"license={said}")


def test_a_licence_that_the_hub_does_not_list(distilled: Path) -> None:
    text = card.card(facts(distilled, licence=licences.KNOWN["nvidia-open-model-license"]))
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "nvidia-open-model-license")
    assert data["license_link"].startswith("https://www.nvidia.com/")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("license: other", "needs a license_name"),
        ("license: other\nlicense_name: Two Words", "license_name"),
        ("base_model: a/b/c", "base_model: a/b/c"),
        ("tags: [1, 2]", "tags"),
    ],
)
def test_metadata_that_the_hub_refuses(metadata: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        card.check(f"---\n{metadata}\n---\n")


def test_an_unknown_licence_is_asked_for(base: Path) -> None:
    (base / "README.md").unlink()
    with pytest.raises(InputError, match="says what it is under; say license=NAME"):
        card.licence_of(None, lineage(base))
    assert card.licence_of("none", lineage(base)) is None
    assert card.licence_of("mit", lineage(base)).name == "mit"


def test_a_gguf_source_s_licence(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("general.license", "apache-2.0")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/org/name")
    writer.add_tensor("token_embd.weight", __import__("numpy").zeros((2, 2), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = lineage(tmp_path / "a.gguf")
    assert (found.base_name, found.licence) == ("org/name", "apache-2.0")


def test_a_modelfile() -> None:
    text = modelfile("model-F16.gguf", ["<|im_end|>", "<|im_end|>", 'a"b', "\n"], 512, "Apache License 2.0")
    assert text.splitlines()[1:] == [
        "FROM ./model-F16.gguf",
        "PARAMETER num_ctx 512",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a\\"b"',
        'LICENSE """Apache License 2.0"""',
    ]


def test_what_other_programs_do_not_open() -> None:
    square = ARCH.replace(kv_channels=6)
    assert consumers.refusals(square) == consumers.refusals(of_family("qwen3")) == []
    assert [line.split()[0] for line in consumers.refusals(of_family("qwen2"))] == [
        "llama.cpp",
        "Ollama",
        "vLLM",
        "MLX",
    ]
    odd = ARCH.replace(num_attention_heads=5, num_query_groups=5)
    assert ["transformers 5" in line for line in consumers.refusals(odd)] == [True]


# ---- a hub on loopback ---------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a commit needs: small files inside of it, large ones by LFS before."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen: dict[str, Any] = self.server.seen  # type: ignore[attr-defined]
        if self.server.refuses:  # type: ignore[attr-defined]
            return self._answer(403, {"error": "not yours"})
        if self.path == "/api/repos/create":
            seen["created"] = json.loads(body)
            return self._answer(200, {"url": f"{self._address()}/me/Llama-student"})
        if self.path == "/api/validate-yaml":
            seen["validated"] = json.loads(body)["content"]
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{**f, "uploadMode": "lfs" if f["size"] > 1000 else "regular"} for f in files]
            answer = [
                {"path": f["path"], "uploadMode": f["uploadMode"], "shouldIgnore": False} for f in modes
            ]
            return self._answer(200, {"files": answer})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [
                {**o, "actions": {"upload": {"href": f"{self._address()}/upload/{o['oid']}"}}}
                for o in objects
            ]
            return self._answer(200, {"transfer": "basic", "objects": upload})
        assert "/commit/" in self.path, self.path
        seen["commit"] = [json.loads(line) for line in body.splitlines()]
        where = f"{self._address()}/me/Llama-student/commit/1"
        return self._answer(200, {"commitUrl": where, "commitOid": "1"})

    def do_PUT(self) -> None:
        self.server.seen["put"] = self.rfile.read(int(self.headers["Content-Length"]))  # type: ignore[attr-defined]
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(404, {"error": "no"})

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch, *, refuses: bool = False) -> Iterator[dict[str, Any]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = {}, refuses  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_not_one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_pushed_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "model.safetensors").write_bytes(b"w" * 5000)
    assert hub.files_of(tmp_path) == [("README.md", 4), ("model.safetensors", 5000)]
    assert (
        hub.listing(tmp_path, "me/Llama-student").splitlines()[0] == "me/Llama-student: 2 files, 5,004 bytes"
    )
    with stand_in(monkeypatch) as seen:
        assert hub.push(tmp_path, "me/Llama-student").endswith("/me/Llama-student/commit/1")
    assert (seen["created"]["name"], seen["created"]["private"]) == ("Llama-student", True)
    assert seen["put"] == b"w" * 5000
    sent = {entry["value"]["path"]: entry["key"] for entry in seen["commit"] if "path" in entry["value"]}
    assert sent == {"README.md": "file", "model.safetensors": "lfsFile"}


def test_a_hub_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("card")
    with (
        stand_in(monkeypatch, refuses=True) as seen,
        pytest.raises(RuntimeError, match="publish=me/x: .*403"),
    ):
        hub.push(tmp_path, "me/x")
    assert not seen


def test_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x", "a/b/c", "a/", "/b", "a b/c", "a/" + "x" * 200, ""):
        with pytest.raises(InputError, match="must be ORG/NAME"):
            hub.check_repository(name, push=False)
    hub.check_repository("org/name", push=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="push=true: no token"):
        hub.check_repository("org/name", push=True)
