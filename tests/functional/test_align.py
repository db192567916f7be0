"""recipes/sft.py and recipes/preference.py as a user types them; transformers is the reference for the losses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.template import CHAT_TEMPLATE
from nemo_minitron.files import read_steps
from tests.functional.conftest import Teacher
from tests.support import conversations, ranks, sessions
from tests.support.commands import ROOT, Commands, Ended
from tests.support.tracked import same_as_steps

PATIENCE_S = 240
TRAIN, VALID, STEPS = 8, 6, 5
LONGEST = 16
SAMPLES = [f"align.samples={VALID}", f"align.samples_max_new_tokens={LONGEST}"]


@dataclass(frozen=True)
class Aligned:
    run_dir: Path
    ended: Ended

    @property
    def result(self) -> dict[str, Any]:
        return self.ended.result()

    def steps(self, split: str, key: str = "loss") -> dict[int, float]:
        lines = read_steps(self.run_dir / "steps.jsonl")
        return {line["step"]: line[key] for line in lines if line["split"] == split}

    def samples(self, step: int) -> list[dict[str, str]]:
        """Prompts, answers and references of the validation after so many steps."""
        return [line for line in read_steps(self.run_dir / "samples.jsonl") if line.pop("step") == step]

    def exported(self) -> Path:
        """The result as a Hugging Face directory."""
        checkpoint, output = str(self.run_dir / "checkpoint"), self.run_dir / "hf"
        ranks.run_on_ranks(1, sessions.exported, checkpoint, str(output), timeout=PATIENCE_S)
        return output


@dataclass(frozen=True)
class Data:
    train: Path
    valid: Path
    pairs: Path
    valid_pairs: Path

    def overrides(self, train: Path, valid: Path) -> list[str]:
        return [f"align.train={train}", f"align.valid={valid}"]


@pytest.fixture(scope="module")
def data(commands: Commands) -> Data:
    return conversation_files(commands.home / "conversations")


def conversation_files(home: Path) -> Data:
    return Data(
        conversations.conversations(home / "train.jsonl", range(TRAIN)),
        conversations.conversations(home / "valid.jsonl", range(100, 100 + VALID)),
        conversations.pairs(home / "pairs.jsonl", range(TRAIN)),
        conversations.pairs(home / "valid_pairs.jsonl", range(100, 100 + TRAIN)),
    )


def settings(commands: Commands, teacher: Teacher, run_dir: Path) -> list[str]:
    """One step sees all samples, a microbatch each: then no layout changes what a step's loss is the mean of."""
    return [
        *(override for override in commands.data() if not override.startswith("trainer.")),
        "trainer.micro_batch_size=1",
        f"align.global_batch_size={TRAIN}",
        f"align.max_steps={STEPS}",
        "align.optim.warmup_steps=1",
        "align.optim.lr=5e-3",
        f"student={teacher.huggingface}",
        f"run_dir={run_dir}",
    ]


def align(
    commands: Commands, teacher: Teacher, data: Data, name: str, *overrides: str, nproc: int | None = None
) -> Aligned:
    run_dir = commands.home / name
    files = data.overrides(data.train, data.valid)
    ended = commands.run("sft", *settings(commands, teacher, run_dir), *files, *overrides, nproc=nproc)
    assert ended.code == 0, ended.stderr[-4000:]
    return Aligned(run_dir, ended)


@pytest.fixture(scope="module")
def tuned(commands: Commands, teacher: Teacher, data: Data) -> Aligned:
    return align(commands, teacher, data, "sft", *SAMPLES, "logger=tensorboard")


def test_tensorboard_hears_of_every_step(tuned: Aligned) -> None:
    same_as_steps(tuned.run_dir, "loss", "grad_norm", "seconds", "tokens_per_s", "peak_rss_gib")
    assert set(tuned.steps("train", "tokens").values()) == {tuned.result["train_answer_tokens"]}


def opened(directory: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval(), tokenizer


def test_the_loss_is_of_the_answers_only(teacher: Teacher, data: Data, tuned: Aligned) -> None:
    """Before the first step it is what transformers gives for the student's own weights; then it falls."""
    model, tokenizer = opened(teacher.huggingface)
    assert tokenizer.chat_template is None
    tokenizer.chat_template = CHAT_TEMPLATE
    train, valid = (conversations.sft_loss(model, tokenizer, path) for path in (data.train, data.valid))
    result = tuned.result
    assert result["valid_loss_nats_before"] == pytest.approx(valid, rel=1e-5)
    losses = tuned.steps("train")
    assert list(losses) == list(range(STEPS))
    assert losses[0] == pytest.approx(train, rel=1e-5)
    assert losses[STEPS - 1] < losses[0] - 0.5
    assert result["valid_loss_nats_after"] == tuned.steps("valid")[STEPS]
    assert (result["train_samples"], result["train_dropped"], result["train_cut"]) == (TRAIN, 0, 0)


def test_answers_before_the_first_step(teacher: Teacher, data: Data, tuned: Aligned) -> None:
    """Those of transformers' greedy generation. The losses above, of steps after it, are as they are without it."""
    model, tokenizer = opened(teacher.huggingface)
    tokenizer.chat_template = CHAT_TEMPLATE
    found = tuned.samples(0)
    assert found == conversations.greedy_answers(model, tokenizer, data.valid, LONGEST)
    assert len(found) == len(tuned.samples(STEPS)) == VALID


def test_the_result_keeps_tokenizer_and_template(teacher: Teacher, tuned: Aligned) -> None:
    from transformers import AutoTokenizer

    kept = AutoTokenizer.from_pretrained(tuned.run_dir / "checkpoint" / "context" / "tokenizer")
    before = AutoTokenizer.from_pretrained(teacher.huggingface)
    assert kept.chat_template == CHAT_TEMPLATE
    assert kept.get_vocab() == before.get_vocab()
    text = "def f(x):\n    return x"
    assert kept.encode(text) == before.encode(text)


@pytest.mark.slow
def test_the_exported_result_is_what_was_trained(data: Data, tuned: Aligned) -> None:
    """NeMo-Aligner's last validation, and transformers' on the weights that went NeMo 2 and Hugging Face."""
    model, tokenizer = opened(tuned.exported())
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tuned.samples(STEPS) == conversations.greedy_answers(model, tokenizer, data.valid, LONGEST)
    expected = tuned.result["valid_loss_nats_after"]
    assert conversations.sft_loss(model, tokenizer, data.valid) == pytest.approx(expected, rel=1e-5)


LAYOUTS = {
    "tp2": ["trainer.tensor_model_parallel_size=2", "trainer.sequence_parallel=true"],
    "pp2": ["trainer.pipeline_model_parallel_size=2"],
    "dp2": ["trainer.data_parallel_size=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(
    commands: Commands, teacher: Teacher, data: Data, tuned: Aligned, layout: str
) -> None:
    """Each step's loss, the held-out losses and the answers; the result opens in one process again."""
    found = align(commands, teacher, data, f"sft-{layout}", *LAYOUTS[layout], *SAMPLES, nproc=2)
    assert found.samples(0) == tuned.samples(0)
    for split in ("train", "valid"):
        assert found.steps(split) == pytest.approx(tuned.steps(split), rel=1e-4)
    model, tokenizer = opened(found.exported())
    expected = found.result["valid_loss_nats_after"]
    assert conversations.sft_loss(model, tokenizer, data.valid) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_answers_of_batches_on_two_tensor_parallel_ranks(
    commands: Commands, teacher: Teacher, data: Data
) -> None:
    """Of a model that has learnt to write, so that they differ, to prompts of different lengths in one batch."""
    student = ROOT / "assets" / "demo-teacher"
    more = [f"student={student}", "trainer.micro_batch_size=2"]
    samples = ["align.samples=3", "align.samples_max_new_tokens=24", "align.max_steps=1"]
    found = align(commands, teacher, data, "sft-answers", *LAYOUTS["tp2"], *more, *samples, nproc=2)
    model, tokenizer = opened(student)
    tokenizer.chat_template = CHAT_TEMPLATE
    expected = conversations.greedy_answers(model, tokenizer, data.valid, 24)[:3]
    assert found.samples(0) == expected
    assert len({line["answer"] for line in expected}) > 1


@pytest.mark.slow
def test_adapters_are_merged(commands: Commands, teacher: Teacher, data: Data) -> None:
    """The held-out loss with adapters beside the weights is that of the weights that they were merged into."""
    found = align(
        commands, teacher, data, "sft-lora", "align=lora", "trainer.tensor_model_parallel_size=2", nproc=2
    )
    losses = found.steps("train")
    assert losses[STEPS - 1] < losses[0] - 0.1
    merged = conversations.sft_loss(*opened(found.exported()), data.valid)
    assert found.result["valid_loss_nats_after"] == pytest.approx(merged, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    commands: Commands, teacher: Teacher, data: Data, peft: str
) -> None:
    """Killed after some steps that no checkpoint has and, training all weights, while a checkpoint is written."""
    more = ["align.max_steps=12", "align.val_check_interval=4", "align.global_batch_size=4"]
    more += [f"align.peft={peft}", "align.samples=2", "align.samples_max_new_tokens=4"]
    straight = align(commands, teacher, data, f"sft-straight-{peft}", *more)
    run_dir = commands.home / f"sft-killed-{peft}"
    overrides = [*settings(commands, teacher, run_dir), *data.overrides(data.train, data.valid), *more]
    killed = Aligned(run_dir, straight.ended)
    steps, saved = run_dir / "steps.jsonl", run_dir / "aligner" / "checkpoints"

    def at(step: int) -> bool:
        return steps.exists() and f'{{"step": {step}, "split": "train"' in steps.read_text()

    def writing(seen: str) -> bool:
        return at(7) and any(saved.glob("*-unfinished"))

    moments = [lambda seen: at(5), *([writing] if peft == "none" else [])]
    for number, moment in enumerate(moments):
        log = commands.home / f"sft-{peft}-{number}.log"
        commands.killed("sft", *overrides, log=log, when=moment)
    assert not (run_dir / "result.json").exists()
    ended = commands.run("sft", *overrides)
    assert ended.code == 0, ended.stderr[-4000:]
    for split in ("train", "valid"):
        assert killed.steps(split) == straight.steps(split)
    for step in (0, 4, 8, 12):
        assert killed.samples(step) == straight.samples(step)
        assert len(killed.samples(step)) == 2
    assert ended.result()["valid_loss_nats_after"] == straight.result["valid_loss_nats_after"]


@pytest.mark.slow
def test_preference_training_moves_towards_the_rewards(
    commands: Commands, teacher: Teacher, data: Data, tuned: Aligned
) -> None:
    """RPO's loss before and after, as transformers computes it from both models' log-probabilities."""
    run_dir = commands.home / "preference"
    ended = commands.run(
        "preference",
        *settings(commands, teacher, run_dir),
        *data.overrides(data.pairs, data.valid_pairs),
        f"student={tuned.run_dir}",
        "align.optim.lr=1e-3",
    )
    result = (found := Aligned(run_dir, ended)).result
    (before, tokenizer), (after, _) = opened(tuned.exported()), opened(found.exported())
    first, last = (
        conversations.rpo_bwd_kl(m, before, tokenizer, data.valid_pairs, 0.1) for m in (before, after)
    )
    assert result["valid_loss_nats_before"] == pytest.approx(first, rel=1e-5)
    assert last < first
    assert result["valid_loss_nats_after"] == pytest.approx(last, rel=1e-4)
    assert set(found.steps("train", "tokens").values()) == {result["train_answer_tokens"]}


def larger_tokenizer(home: Path) -> Path:
    """The demo teacher's with more entries than its embedding has rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "demo-teacher")
    tokenizer.add_tokens([f"<new{number}>" for number in range(6)])
    tokenizer.save_pretrained(home / "larger")
    return home / "larger"


def swapped_tokenizer(home: Path) -> Path:
    """The demo teacher's with two entries in each other's place."""
    source = ROOT / "assets" / "demo-teacher"
    (home / "swapped").mkdir()
    for file in source.glob("*token*.json"):
        (home / "swapped" / file.name).write_bytes(file.read_bytes())
    whole = json.loads((source / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    first, second = (next(word for word, n in vocabulary.items() if n == number) for number in (1000, 1001))
    vocabulary[first], vocabulary[second] = 1001, 1000
    (home / "swapped" / "tokenizer.json").write_text(json.dumps(whole))
    return home / "swapped"


def bad_pairs(commands: Commands, data: Data, home: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cases by name, and what to ask."""
    pair = {"messages": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}
    rewarded = {**pair, "chosen_reward": 1.0, "rejected_reward": 0.0}
    cases = {
        "rewards": ([rewarded, pair], [], ["rewards.jsonl, line 2", "chosen_reward", "rpo_bwd_kl"]),
        "same": ([rewarded, {**rewarded, "rejected": "a"}], [], ["line 2", "same"]),
        "loss": ([rewarded], ["align.dpo.preference_loss=orpo"], ["preference_loss=orpo", "dpo, ipo"]),
        "penalty": ([rewarded], ["align.dpo.ref_policy_kl_penalty=0"], ["ref_policy_kl_penalty=0"]),
        "answers": ([rewarded], ["align.samples=1"], ["align.samples=1", "must be 0", "recipes/sft.py"]),
        "cut-pairs": ([rewarded], ["align.overlong=cut"], ["align.overlong=cut"]),
    }
    asked = []
    for name, (rows, more, _) in cases.items():
        path = conversations.write(home / f"{name}.jsonl", rows)
        overrides = [
            *("trainer.micro_batch_size=1", "align.global_batch_size=1", f"align.train={path}"),
            *(f"align.valid={data.pairs}", f"student={ROOT / 'assets' / 'demo-teacher'}"),
            f"run_dir={home / 'runs' / name}",
        ]
        asked.append(
            {"recipe": "preference", "overrides": [*overrides, *more], "env": commands.environment()}
        )
    return cases, asked


def check_refusals(cases: dict[str, Any], found: list[dict[str, Any]], home: Path) -> None:
    """One line with all that it has to say, exit code 2, before NeMo is imported, nothing trained."""
    for (name, (_, _, says)), answer in zip(cases.items(), found, strict=True):
        assert answer["code"] == 2, (name, answer["err"][-2000:])
        refusals = [line for line in answer["err"].splitlines() if line.startswith("error: ")]
        assert len(refusals) == 1, (name, answer["err"])
        for part in says:
            assert part in refusals[0], name
        assert not answer["nemo"], name
        assert not (home / "runs" / name / "aligner").exists(), name


def bad_conversations(
    commands: Commands, data: Data, home: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cases by name, and what to ask."""

    def file(name: str, *messages: Any) -> Path:
        return conversations.write(home / f"{name}.jsonl", [{"messages": m} for m in messages])

    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    good = [user, answer]
    long = [{"role": "user", "content": "word " * 200}, answer]
    template = home / "bad.jinja"
    home.mkdir(parents=True)
    template.write_text("{{ messages[0].nothing.at.all }}")
    cases = {
        "assistant-first": (
            file("first", good, [answer, user, answer]),
            [],
            ["first.jsonl, line 2", "start"],
        ),
        "role": (file("role", [{"role": "robot", "content": "x"}, answer]), [], ["line 1", "robot"]),
        "empty": (file("empty", good, good, [user, {**answer, "content": " "}]), [], ["line 3", "empty"]),
        "long": (file("long", good, long), [], ["long.jsonl, line 2", "context", "align.overlong=drop"]),
        "cut-to-nothing": (file("cut", long), ["align.overlong=cut"], ["cut.jsonl, line 1", "empty"]),
        "all-dropped": (file("drop", long), ["align.overlong=drop"], ["1 dropped"]),
        "template": (data.train, [f"align.chat_template={template}"], [str(template), "render"]),
        "packed": (
            data.train,
            ["align.packed_sequence=true"],
            ["packed_sequence=true", "Transformer Engine"],
        ),
        "few": (data.train, ["align.global_batch_size=80"], ["align.train", "80"]),
        "longer": (data.train, ["align.overlong=split"], ["align.overlong=split", "drop"]),
        "no-samples": (data.train, ["align.samples=-1"], ["align.samples=-1", "at least 0"]),
        "many-samples": (data.train, ["align.samples=7"], ["align.samples=7", "at most 6"]),
        "no-answers": (
            data.train,
            ["align.samples=1", "align.samples_max_new_tokens=0"],
            ["align.samples_max_new_tokens=0"],
        ),
        "missing": (home / "nowhere.jsonl", [], ["nowhere.jsonl"]),
        "vocabulary": (
            data.train,
            [f"data.tokenizer={larger_tokenizer(home)}"],
            ["1024 rows", "1030 entries"],
        ),
        "other-vocabulary": (
            data.train,
            [f"data.tokenizer={swapped_tokenizer(home)}"],
            ["swapped", "id 1000"],
        ),
        "one-file": (data.train, ["align.valid=null"], ["align.valid=null"]),
        "student": (data.train, ["student=nowhere"], ["student=nowhere", "no such directory"]),
    }
    asked = []
    for name, (path, more, _) in cases.items():
        overrides = ["data.seq_length=128", "trainer.micro_batch_size=1", "align.global_batch_size=1"]
        files = [f"align.train={path}", f"align.valid={data.valid}", f"run_dir={home / 'runs' / name}"]
        given = [*overrides, *files, *more]
        asked.append({"recipe": "sft", "overrides": given, "env": commands.environment()})
    return cases, asked


def test_bad_input_is_refused(commands: Commands, data: Data) -> None:
    """Conversations and pairs by file and line, settings by name."""
    home = commands.home / "bad-conversations"
    made = [bad(commands, data, home) for bad in (bad_conversations, bad_pairs)]
    cases = {name: case for named, _ in made for name, case in named.items()}
    check_refusals(cases, commands.ask([case for _, asked in made for case in asked]), home)
