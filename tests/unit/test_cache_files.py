"""A teacher's cache on disk: what was written is read again, and nothing else is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.distillation.cache.format import digest
from nemo_minitron.distillation.cache.reader import TeacherCache, covers
from nemo_minitron.distillation.cache.top_k_logits import most_probable
from nemo_minitron.errors import InputError
from tests.support.cached_teachers import K, S, V, random_cache

ORDER = torch.tensor([9, 0, 4, 4, 7])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_come_back_in_any_order(tmp_path: Path, dtype: str) -> None:
    made = random_cache(tmp_path, "hidden", dtype=dtype)
    made.write() if dtype == "float32" else _narrow(made)
    cache = TeacherCache(tmp_path)
    cache.verify()
    kind = getattr(torch, dtype)
    assert torch.equal(cache.hidden(made.tokens[ORDER]), made.hidden[ORDER].to(kind).transpose(0, 1))
    part = cache.hidden(made.tokens[:2], slice(2, 4))
    assert torch.equal(part, made.hidden[:2, 2:4].to(kind).transpose(0, 1))
    assert torch.equal(cache.head(slice(10, 20)), made.head[10:20].to(kind))


def _narrow(made) -> None:
    made.head = made.head.bfloat16()
    made.write()


def test_the_size_is_known_before(tmp_path: Path) -> None:
    for form in ("hidden", "top_k"):
        made = random_cache(tmp_path / form, form)
        made.write()
        tensors = [t for file in made.plan.directory.glob("*.safetensors") for t in load_file(file).values()]
        assert sum(t.numel() * t.element_size() for t in tensors) == made.plan.contents.bytes
    # 4,096 channels of two bytes; 64 logits and tokens and the tail.
    big = random_cache(tmp_path, "hidden", hidden_size=4096, dtype="bfloat16").plan.contents
    assert big.bytes_per_token == 8192
    assert random_cache(tmp_path, "top_k", top_k=64, dtype="bfloat16").plan.contents.bytes_per_token == 388


@pytest.mark.parametrize("k", [K, 3, 1])
def test_fewer_tokens_than_were_kept(tmp_path: Path, k: int) -> None:
    """What lies between joins the tail."""
    made = random_cache(tmp_path, "top_k")
    made.write()
    found = TeacherCache(tmp_path).top_k(made.tokens[ORDER], k, tail=True)
    logits = made.logits[ORDER].double().transpose(0, 1)
    values, indices = logits.topk(k)
    assert torch.equal(found.indices.long(), indices)
    largest = values[..., :1]
    torch.testing.assert_close(found.values.double(), values - largest, rtol=0, atol=1e-5)
    rest = (logits.scatter(-1, indices, -torch.inf) - largest) / 2.0
    torch.testing.assert_close(found.tail_logsumexp.double(), rest.logsumexp(-1), rtol=0, atol=1e-5)
    assert TeacherCache(tmp_path).top_k(made.tokens, k, tail=False).tail_logsumexp is None


@pytest.mark.parametrize("k", [1, 7, V])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_probable_tokens(tmp_path: Path, k: int, dtype: torch.dtype) -> None:
    made = random_cache(tmp_path, "top_k")
    hidden, head = made.hidden.flatten(0, 1).to(dtype), (made.head * 3).to(dtype)
    found = most_probable(hidden, head, k, 0.7, vocab_size=V, chunk_bytes=4 * V * 7)
    logits = hidden.double() @ head.double().T
    values, indices = logits.topk(k)
    assert torch.equal(logits.gather(1, found["indices"].long()), values)
    torch.testing.assert_close(found["values"].double(), values - values[:, :1], rtol=0, atol=2e-5)
    rest = ((logits.scatter(1, indices, -torch.inf) - values[:, :1]) / 0.7).logsumexp(1)
    torch.testing.assert_close(found["tail_logsumexp"].double(), rest, rtol=0, atol=5e-5)


def test_a_missing_sequence_is_named(tmp_path: Path) -> None:
    made = random_cache(tmp_path, "hidden")
    made.write()
    cache, other = TeacherCache(tmp_path), made.tokens.flip(1)
    with pytest.raises(InputError, match=f"lacks the sequence that begins \\[{other[0, 0]}, "):
        cache.hidden(torch.stack([made.tokens[0], other[0]]).flip(0))
    mixed = torch.cat([made.tokens, other[:3]])
    with pytest.raises(
        InputError, match="lacks 3 of the 13 train sequences of this run, the first is number 10"
    ):
        covers(cache, lambda i: mixed[i], 13, "train")
    covers(cache, lambda i: made.tokens[i], 10, "train")


def test_what_was_finished_is_kept(tmp_path: Path) -> None:
    made = random_cache(tmp_path, "hidden")
    made.write(0, 2)
    stray = made.plan.directory / ".shard-000001.safetensors.77.tmp"
    stray.write_bytes(b"half")
    with pytest.raises(InputError, match="unfinished.*the same recipes/cache_teacher.py command goes on"):
        TeacherCache(tmp_path)
    assert set(made.plan.finished()) == {0, 2}
    # Cut short, or never noted: not finished.
    first = made.plan.directory / "shard-000000.safetensors"
    first.write_bytes(first.read_bytes()[:-1])
    assert set(made.plan.finished()) == {2}
    (made.plan.directory / "shard-000002.json").unlink()
    assert made.plan.finished() == {}
    made.write()
    assert not stray.exists()
    assert torch.equal(TeacherCache(tmp_path).hidden(made.tokens), made.hidden.transpose(0, 1))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seq_length": 8}, "seq_length 6, not 8"),
        ({"teacher_sha256": ("x",)}, "teacher_sha256"),
        ({"samples": {"train": 9, "valid": 2}}, "samples"),
        ({"dtype": "bfloat16"}, "dtype float32, not bfloat16"),
    ],
)
def test_an_unfinished_cache_of_something_else(tmp_path: Path, changes: dict, says: str) -> None:
    random_cache(tmp_path, "hidden").write(0)
    with pytest.raises(InputError, match=f"unfinished cache with {says}.*overwrite=true"):
        random_cache(tmp_path, "hidden", **changes).plan.finished()


# ---- damaged and hostile ---------------------------------------------------------------------------------------


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(cache: Path) -> None:
        fields = json.loads((cache / "manifest.json").read_text())
        change(fields)
        (cache / "manifest.json").write_text(json.dumps(fields))

    return apply


def flip_a_bit(cache: Path) -> None:
    shard = cache / "shard-000001.safetensors"
    held = bytearray(shard.read_bytes())
    held[-3] ^= 1
    shard.write_bytes(held)


def another_shape(cache: Path) -> None:
    shard = cache / "shard-000001.safetensors"
    tensors = load_file(shard)
    tensors["hidden"] = tensors["hidden"].view(4, -1, S).contiguous()
    save_file(tensors, shard)
    edit(lambda m: m["shards"][1].update(bytes=shard.stat().st_size))(cache)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip_a_bit, "shard-000001.safetensors is corrupt: its sha256"),
    "cut": (
        lambda c: (c / "head.safetensors").write_bytes(b""),
        "head.safetensors is corrupt: it has 0 bytes",
    ),
    "gone": (lambda c: (c / "shard-000002.safetensors").unlink(), "shard-000002.safetensors is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "unfinished: cache/manifest.json is missing"),
    "no cache": (lambda c: shutil.rmtree(c), "no teacher's cache here"),
    "no json": (lambda c: (c / "manifest.json").write_text("{"), "is no manifest of a teacher's cache"),
    "a list": (lambda c: (c / "manifest.json").write_text("[]"), "is no manifest of a teacher's cache"),
    "deep": (lambda c: (c / "manifest.json").write_text("[" * 100000), "is no manifest of a teacher's cache"),
    "version": (edit(lambda m: m.update(format_version=2)), "format version 2, this version reads 1"),
    "outside": (
        edit(lambda m: m["shards"][0].update(name="../../secret.safetensors")),
        "'../../secret.safetensors'",
    ),
    "a path": (edit(lambda m: m["head"].update(name="/etc/passwd")), "'/etc/passwd'"),
    "a word": (edit(lambda m: m["contents"].update(hidden_size="5")), "ValueError: sizes"),
    "two lines": (edit(lambda m: m["contents"].update(data_sha256="a\nb")), "ValueError: names"),
    "more": (edit(lambda m: m["contents"]["samples"].update(train=9)), "ValueError: sequences"),
    "sauce": (edit(lambda m: m["contents"].update(sauce=1)), "TypeError"),
    "no head": (edit(lambda m: m.update(head=None)), "ValueError: head"),
    "form": (edit(lambda m: m["contents"].update(form="logits")), "ValueError: form or dtype"),
    "shape": (another_shape, "shard-000001.safetensors holds"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refused(tmp_path: Path, name: str) -> None:
    made = random_cache(tmp_path, "hidden")
    made.write()
    damage, says = DAMAGE[name]
    damage(made.plan.directory)

    def read() -> None:
        cache = TeacherCache(tmp_path)
        if name != "shape":
            cache.verify()
        cache.hidden(made.tokens)

    with pytest.raises(InputError) as caught:
        read()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"teacher_cache={tmp_path}: ")


def test_names_go_by_the_tokens_alone() -> None:
    tokens = torch.tensor([[1, 2, 3], [3, 2, 1]])
    first, second = digest(tokens)
    assert first != second
    assert digest(tokens.int().flip(0)) == [second, first]
    assert len(first) == 16
