"""recipes/cache_teacher.py, and distillation from what it wrote against the live teacher."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from nemo_minitron.config.recipes import CacheTeacherRecipe, DataConfig, DistillRecipe, parse
from nemo_minitron.data.prepare import prepare_data
from nemo_minitron.data.sequences import SplitSequences
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.errors import InputError
from nemo_minitron.run.main import register_resolvers
from nemo_minitron.workflows.cache_teacher import check as cache_teacher
from nemo_minitron.workflows.distill import check as distill
from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import ROOT, SEQ_LENGTH, SIZES, Commands
from tests.support.kill_trials import unmeasured

STEPS, K = 6, 16
SCHEDULE = [f"distill.max_steps={STEPS}", "distill.optim.warmup_steps=1", "distill.limit_val_batches=2"]
LAYOUTS: dict[str, list[str]] = {
    "tp2-sp": ["tensor_model_parallel_size=2", "sequence_parallel=true"],
    "pp2": ["pipeline_model_parallel_size=2", "micro_batch_size=2"],
    "dp2": ["data_parallel_size=2", "micro_batch_size=4"],
}
TOP_K = [f"distill.top_k={K}", "distill.temperature=2.0"]


class Runs:
    """Recipes in this module's directory; each has a run directory of its own name."""

    def __init__(self, commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
        self.commands, self.teacher, self.student = commands, teacher, pruned.run_dir

    def path(self, name: str) -> Path:
        return self.commands.home / f"cached-{name}"

    def writing(self, name: str, *more: str) -> list[str]:
        mine = [f"teacher={self.teacher.huggingface}", f"run_dir={self.path(name)}", "cache.shard_mib=1"]
        return ["+conf=width", *self.commands.data(), *SCHEDULE, *mine, *more]

    def distilling(self, name: str, *more: str) -> list[str]:
        mine = [f"student={self.student}", f"run_dir={self.path(name)}"]
        return ["+conf=width", *self.commands.data(), *SCHEDULE, *mine, *more]

    def live(self, name: str, *more: str) -> list[str]:
        return self.distilling(name, f"teacher={self.teacher.huggingface}", *more)

    def from_cache(self, name: str, cache: str, *more: str) -> list[str]:
        return self.distilling(name, f"teacher_cache={self.path(cache)}", *more)

    def in_turn(self, *asked: tuple[str, list[str]]) -> list[str]:
        """Run several in one process for all; what each said on stderr."""
        cases = [{"recipe": recipe, "overrides": overrides, "env": {}} for recipe, overrides in asked]
        answers = self.commands.ask(cases, script="in_turn.py")
        for answer in answers:
            assert answer["code"] == 0, answer["err"][-3000:]
        return [answer["err"] for answer in answers]

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.path(name) / "result.json").read_text())

    def lines(self, name: str, split: str) -> list[dict[str, float]]:
        found = [unmeasured(line) for line in (self.path(name) / "steps.jsonl").read_text().splitlines()]
        return [line for line in found if line.pop("split") == split]

    def shards(self, name: str) -> list[dict[str, torch.Tensor]]:
        return [load_file(file) for file in sorted((self.path(name) / "cache").glob("shard-*.safetensors"))]

    def same_states(self, name: str, expected: str) -> None:
        for ours, theirs in zip(self.shards(name), self.shards(expected), strict=True):
            assert torch.equal(ours["digests"], theirs["digests"])
            torch.testing.assert_close(ours["hidden"], theirs["hidden"], rtol=0, atol=1e-5)

    def same_losses(self, name: str, expected: str, tolerance: float) -> None:
        """Every step's losses in nats, to an absolute tolerance."""
        for split, count in (("train", STEPS), ("valid", 1)):
            ours, theirs = self.lines(name, split), self.lines(expected, split)
            assert len(ours) == len(theirs) >= count
            for one, other in zip(ours, theirs, strict=True):
                assert one.keys() == other.keys()
                for key in one:
                    assert math.isclose(one[key], other[key], rel_tol=0, abs_tol=tolerance), (
                        split,
                        key,
                        one,
                        other,
                    )


@pytest.fixture(scope="module")
def runs(commands: Commands, teacher: Teacher, pruned: Pruned) -> Runs:
    """Caches of hidden states; distillations from one and from the live teacher."""
    made = Runs(commands, teacher, pruned)
    made.in_turn(
        ("cache_teacher", made.writing("hidden")),
        ("cache_teacher", made.writing("streamed", "stream=true")),
        ("distill", made.live("live")),
        ("distill", made.from_cache("from-hidden", "hidden")),
    )
    return made


def test_the_cached_teacher_teaches_what_the_live_one_does(runs: Runs) -> None:
    runs.same_losses("from-hidden", "live", 1e-4)
    kl = [line["kl"] for line in runs.lines("live", "train")]
    assert kl[0] > 100 * 1e-4
    assert kl[-1] < kl[0] / 2
    (told,), (own,) = (runs.lines(name, "teacher") for name in ("from-hidden", "live"))
    assert math.isclose(told["lm_loss"], own["lm_loss"], rel_tol=1e-6)
    live, cached = runs.result("live"), runs.result("from-hidden")
    assert math.isclose(cached["lm_loss_nats_after"], live["lm_loss_nats_after"], rel_tol=1e-5)
    assert cached["teacher"] == live["teacher"]
    assert (cached["teacher_cache"], live["teacher_cache"]) == (str(runs.path("hidden")), None)


def test_the_result_says_what_was_kept(runs: Runs) -> None:
    result = runs.result("hidden")
    assert (result["sequences_train"], result["sequences_valid"]) == (STEPS * 8, 2 * 8)
    assert result["bytes_per_token"] == SIZES["hidden_size"] * 4
    held = sum(file.stat().st_size for file in (runs.path("hidden") / "cache").glob("*.safetensors"))
    assert result["bytes"] == held
    assert held > result["tokens"] * result["bytes_per_token"]
    assert result["tokens"] == (STEPS + 2) * 8 * SEQ_LENGTH


def test_the_cache_of_a_teacher_that_no_one_loads(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distillation knows the teacher by the hash of its files, and converts the student alone."""
    runs.same_states("streamed", "hidden")
    opened: list[Path] = []
    monkeypatch.setattr(distill, "converted", lambda source, _: opened.append(source.path) or source)
    monkeypatch.setenv("NEMO_MINITRON_HOME", str(runs.commands.cache))
    asked = runs.from_cache("accepted", "streamed", f"teacher={runs.teacher.huggingface}")
    prepared = distill.check(parse(DistillRecipe, composed("distill", asked)))
    assert isinstance(prepared.teacher, TeacherCache)
    assert opened == [(runs.student / "checkpoint").resolve()]


def test_the_states_are_transformers_own(runs: Runs) -> None:
    """Logits out of the cache's states and output layer against Llama's in transformers."""
    from transformers import LlamaForCausalLM

    config = composed("cache_teacher", runs.writing("hidden")).data
    data = prepare_data(DataConfig(**config), str(runs.teacher.huggingface))
    sequences = SplitSequences(data, DataConfig(**config), "train", STEPS * 8)
    tokens = torch.stack([sequences.tokens(i) for i in (5, 0, 41)])
    cache = TeacherCache(runs.path("hidden"))
    logits = cache.hidden(tokens).transpose(0, 1) @ cache.head(slice(None)).T
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(runs.teacher.huggingface)(tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


# ---- refused before a model is loaded --------------------------------------------------------------------------


def composed(recipe: str, overrides: list[str]) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        register_resolvers(recipe)
        return compose(recipe, overrides=overrides)


def damaged(runs: Runs, name: str, damage: Callable[[Path], object]) -> list[str]:
    shutil.copytree(runs.path("hidden") / "cache", runs.path(name) / "cache")
    damage(runs.path(name) / "cache")
    return runs.from_cache("refused", name)


def flip(cache: Path) -> None:
    shard = cache / "shard-000000.safetensors"
    held = bytearray(shard.read_bytes())
    held[len(held) // 2] ^= 4
    shard.write_bytes(held)


def with_top_k(runs: Runs, **changes: Any) -> Path:
    """The manifest of the hidden cache as one of form top_k: shards are looked at only after it is."""
    path = runs.path("-".join(["top_k", *map(str, changes.values())]))
    shutil.copytree(runs.path("hidden") / "cache", path / "cache")
    manifest = json.loads((path / "cache" / "manifest.json").read_text())
    manifest["contents"] |= {"form": "top_k", "top_k": K, "temperature": 2.0, **changes}
    manifest["head"] = None
    (path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    return path


REFUSED: dict[str, tuple[Callable[[Runs], list[str]], list[str]]] = {
    "corrupt": (lambda r: damaged(r, "flipped", flip), ["shard-000000.safetensors is corrupt", "sha256"]),
    "no manifest": (
        lambda r: damaged(r, "headless", lambda c: (c / "manifest.json").unlink()),
        ["unfinished", "manifest.json is missing"],
    ),
    "no cache": (
        lambda r: r.distilling("refused", f"teacher_cache={r.student}"),
        ["no teacher's cache here"],
    ),
    "nothing there": (lambda r: r.distilling("refused", "teacher_cache=/no/where"), ["no such directory"]),
    "another length": (
        lambda r: r.from_cache("refused", "hidden", "data.seq_length=32"),
        ["was written with data.seq_length=64, this run has 32"],
    ),
    "another order": (
        lambda r: r.from_cache("refused", "hidden", "data.seed=7"),
        ["was written with data.seed=1234, this run has 7"],
    ),
    "another corpus": (
        lambda r: r.from_cache(
            "refused", "hidden", f"data.valid={Path(json.__file__).parent.parent}/html/*.py"
        ),
        ["is of another corpus"],
    ),
    "another tokenizer": (
        lambda r: r.distilling("refused", f"teacher_cache={with_top_k(r, vocabulary_sha256='x')}", *TOP_K),
        ["is of another tokenizer"],
    ),
    "more steps": (
        lambda r: r.from_cache("refused", "hidden", "distill.max_steps=7"),
        ["lacks 8 of the 56 train sequences", "the first is number 48", "cache.train_samples"],
    ),
    "longer validation": (
        lambda r: r.from_cache("refused", "hidden", "distill.limit_val_batches=3"),
        ["lacks 8 of the 24 valid sequences"],
    ),
    "documents apart": (
        lambda r: r.from_cache("refused", "hidden", "data.reset_attention_mask=true"),
        ["data.reset_attention_mask=true: a teacher_cache holds one whose documents see each other; must be"],
    ),
    "intermediate states": (
        lambda r: r.from_cache("refused", "hidden", "distill=demo_intermediate", *SCHEDULE),
        ["distill.intermediate compares states before it", "live teacher"],
    ),
    "no loss on the teacher": (
        lambda r: r.from_cache("refused", "hidden", "distill.loss=cross_entropy"),
        ["distill.loss=cross_entropy has no use for a teacher"],
    ),
    "another teacher": (
        lambda r: r.from_cache("refused", "hidden", f"teacher={r.student}"),
        ["teacher={student}: teacher_cache=", "was made by another", "leave teacher out"],
    ),
    "more tokens than kept": (
        lambda r: r.distilling("refused", f"teacher_cache={with_top_k(r)}", "distill.top_k=17"),
        ["distill.top_k=17", "16 most probable tokens", "at most that many"],
    ),
    "all tokens": (
        lambda r: r.distilling("refused", f"teacher_cache={with_top_k(r, data='a')}"),
        ["distill.top_k=None", "16 most probable tokens"],
    ),
    "another temperature": (
        lambda r: r.distilling("refused", f"teacher_cache={with_top_k(r, data='b')}", "distill.top_k=9"),
        ["distill.temperature=1.0", "has the tail at 2.0", "distill.tail=false"],
    ),
    "padded otherwise": (
        lambda r: r.distilling("refused", f"teacher_cache={with_top_k(r, vocab_size=640)}", *TOP_K),
        ["had 640 rows, the student's has 512"],
    ),
}
REFUSED_WRITING: dict[str, tuple[list[str], list[str]]] = {
    "no room": (
        ["cache.train_samples=2000000000"],
        ["2,000,000,016 sequences", "GiB free", "cache=top_k"],
    ),
    "form": (["cache.form=logits"], ["cache.form=logits", "hidden, top_k"]),
    "no k": (["cache=top_k"], ["distill.top_k=null", "such as 64"]),
    "k": (["cache=top_k", "distill.top_k=513"], ["distill.top_k=513", "at most 512"]),
    "documents apart": (
        ["data.reset_attention_mask=true"],
        ["data.reset_attention_mask=true: a cache holds a teacher whose documents see each other; must be"],
    ),
    "no sequences": (["cache.train_samples=0"], ["cache.train_samples=0", "at least 1"]),
    "no loss": (["distill.loss=cross_entropy"], ["distill.loss=cross_entropy", "no use"]),
}


def refusal(recipe: str, overrides: list[str]) -> str:
    schema, check = {
        "distill": (DistillRecipe, distill.check),
        "cache_teacher": (CacheTeacherRecipe, cache_teacher.check),
    }[recipe]
    with pytest.raises(InputError) as caught:
        check(parse(schema, composed(recipe, overrides)))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_HOME", str(runs.commands.cache))
    make, says = REFUSED[name]
    line = refusal("distill", make(runs))
    for part in says:
        assert part.format(student=runs.student) in line


@pytest.mark.parametrize("name", REFUSED_WRITING)
def test_writing_refused(runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MINITRON_HOME", str(runs.commands.cache))
    overrides, says = REFUSED_WRITING[name]
    line = refusal("cache_teacher", runs.writing("refused", *overrides))
    for part in says:
        assert part in line
    assert not runs.path("refused").exists()


def test_a_refusal_is_one_line_and_exit_code_2(runs: Runs) -> None:
    no_room = runs.writing("refused", *REFUSED_WRITING["no room"][0])
    asked = [("cache_teacher", no_room), ("distill", runs.from_cache("refused", "flipped"))]
    cases = [{"recipe": recipe, "overrides": overrides, "env": {}} for recipe, overrides in asked]
    for answer, says in zip(runs.commands.ask(cases), ("GiB free", "is corrupt"), strict=True):
        (line,) = answer["err"].splitlines()
        assert answer["code"] == 2
        assert line.startswith("error: ")
        assert says in line
        assert not answer["nemo"]


# ---- layouts, batches, kills -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_written_under_one_layout_and_read_under_it(runs: Runs, name: str) -> None:
    """The same states from every layout; the cache of one process serves every layout too."""
    sizes = [f"trainer.{size}" for size in LAYOUTS[name]]
    written = f"hidden-{name}"
    result = runs.commands.run("cache_teacher", *runs.writing(written, *sizes), nproc=2).result()
    assert result["ranks"] == 2
    runs.same_states(written, "hidden")
    runs.commands.run("distill", *runs.from_cache(f"from-{name}", "hidden", *sizes), nproc=2).result()
    runs.same_losses(f"from-{name}", "live", 1e-4)


@pytest.mark.slow
def test_a_small_cache_is_not_made_to_wait_for_a_large_measurement(runs: Runs) -> None:
    """Four sequences are kept: the teacher's own loss is of four, not of the `eval.samples`, 32, of other recipes."""
    few = ["cache.train_samples=3", "cache.valid_samples=1"]
    said, more = runs.in_turn(
        ("cache_teacher", runs.writing("few", *few)),
        ("cache_teacher", runs.writing("many", "cache.train_samples=63", "cache.valid_samples=1")),
    )
    assert re.search(r"teacher: 100%\S* 4/4 ", said)
    assert re.search(r"teacher: 100%\S* 32/32 ", more)


@pytest.mark.slow
def test_another_batch_than_it_was_written_for(runs: Runs) -> None:
    batches = ["distill.max_steps=12", "distill.global_batch_size=4", "trainer.micro_batch_size=2"]
    runs.in_turn(
        ("distill", runs.live("live-4", *batches)),
        ("distill", runs.from_cache("from-streamed-4", "streamed", *batches)),
    )
    runs.same_losses("from-streamed-4", "live-4", 1e-4)


@pytest.mark.slow
def test_the_most_probable_tokens_teach_what_the_live_teacher_s_do(runs: Runs) -> None:
    runs.in_turn(
        ("cache_teacher", runs.writing("top_k", "cache=top_k", *TOP_K)),
        ("distill", runs.live("live-top_k", *TOP_K)),
        ("distill", runs.from_cache("from-top_k", "top_k", *TOP_K)),
    )
    runs.same_losses("from-top_k", "live-top_k", 1e-4)
    assert runs.result("top_k")["bytes_per_token"] == K * 8 + 4
    assert runs.lines("live-top_k", "train")[0]["kl"] != runs.lines("live", "train")[0]["kl"]


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(runs: Runs) -> None:
    many = runs.writing("killed", "cache.train_samples=3000")
    cache = runs.path("killed") / "cache"
    runs.commands.killed(
        "cache_teacher",
        *many,
        log=runs.commands.home / "cached-killed.log",
        when=lambda _: (cache / "shard-000002.json").exists(),
    )
    assert not (cache / "manifest.json").exists()
    before = {file: file.stat().st_mtime_ns for file in cache.glob("shard-*.safetensors")}
    noted = [file for file in before if file.with_suffix(".json").exists()]
    result = runs.commands.run("cache_teacher", *many).result()
    assert 3 <= result["shards_kept"] == len(noted) < result["shards"]
    assert all(file.stat().st_mtime_ns == before[file] for file in noted)
    straight = runs.commands.run(
        "cache_teacher", *runs.writing("straight", "cache.train_samples=3000")
    ).result()
    assert straight["shards_kept"] == 0
    for ours, theirs in zip(runs.shards("killed"), runs.shards("straight"), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (cache / "manifest.json").read_text() == (
        runs.path("straight") / "cache" / "manifest.json"
    ).read_text()
