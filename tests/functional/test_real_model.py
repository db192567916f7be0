"""A real pretrained model through the recipes, beside transformers' own reading of the same GGUF file.

SmolLM2-135M-Instruct (`make real-model`); the text is English: the reference that Python carries for `help()`. With
9 heads in 3 groups it takes three tensor-parallel ranks.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_minitron.checkpoints.families import architecture_of
from nemo_minitron.checkpoints.gguf import to_huggingface
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.data.datasets import gpt_dataset
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.pruning import PrunePlan
from tests.support import gguf_files, llama_cpp
from tests.support.commands import ROOT, Commands
from tests.support.expected_scores import aggregate
from tests.support.kill_trials import unmeasured
from tests.support.streamed import streamed

pytestmark = pytest.mark.slow

SEQ_LENGTH, CALIBRATION, EVALUATED = 128, 16, 8
STEPS, BATCH = 4, 4
# Scores are float32 sums over other orders: units closer than this may change places.
RELATIVE_GAP = 1e-5
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Real:
    """The file, its converted directory, and transformers' model of the file."""

    file: Path
    directory: Path
    model: Any


@pytest.fixture(scope="module")
def real(commands: Commands) -> Real:
    from transformers import AutoModelForCausalLM

    made = subprocess.run(
        ["make", "-s", "real-model"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    file = Path(made.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, torch_dtype=torch.float32, attn_implementation="eager"
    )
    directory = to_huggingface(file, commands.cache / "gguf", "real model", architecture_of)
    return Real(file, directory, model.eval())


@pytest.fixture(scope="module")
def corpus(commands: Commands) -> dict[str, Any]:
    """Settings of the data: English documents, one a file."""
    from pydoc_data.topics import topics

    for split in ("train", "valid"):
        (commands.home / "english" / split).mkdir(parents=True)
    for number, name in enumerate(sorted(topics)):
        split = "valid" if number % 8 == 0 else "train"
        (commands.home / "english" / split / f"{number}.txt").write_text(topics[name])
    english = commands.home / "english"
    return {
        "name": "files",
        "train": f"{english}/train/*.txt",
        "valid": f"{english}/valid/*.txt",
        "seq_length": SEQ_LENGTH,
    }


def overrides(corpus: dict[str, Any]) -> list[str]:
    settings = [f"data.{key}={value}" for key, value in corpus.items() if key != "name"]
    return ["data=files", *settings, f"eval.samples={EVALUATED}", "trainer.micro_batch_size=4"]


@pytest.fixture(scope="module")
def data(commands: Commands, corpus: dict[str, Any], real: Real) -> PreparedData:
    """The data as the recipes have prepared it."""
    return prepare_data(DataConfig(**corpus, cache_dir=str(commands.cache)), str(real.directory))


def tokens_of(data: PreparedData, split: str, samples: int) -> Tensor:
    """The first packed sequences of a split and the token after each: [n, s + 1]."""
    prefix = data.indexed.prefix(split)
    found = gpt_dataset(prefix, split, None, SEQ_LENGTH, DataConfig.seed, data.indexed.eod, data.index_cache)
    items = [found[number] for number in range(samples)]
    return torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])


def pruning(real: Real, corpus: dict[str, Any], run_dir: Path) -> list[str]:
    own = [f"prune.calibration_samples={CALIBRATION}", f"source={real.file}", f"run_dir={run_dir}"]
    return ["+conf=width", *overrides(corpus), *own]


@pytest.fixture(scope="module")
def pruned(commands: Commands, real: Real, corpus: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    run_dir = commands.home / "real-pruned"
    return run_dir, commands.run("prune", *pruning(real, corpus, run_dir)).result()


def test_the_file_becomes_the_model_that_transformers_and_llama_cpp_see(real: Real, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(real.directory)
    expected = real.model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    tokenizer = AutoTokenizer.from_pretrained(real.directory)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    greedy = found.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
    # From the quantised file llama.cpp computes with rounded activations, and leaves this path after five tokens.
    copy = gguf_files.float32_copy(real.file, tmp_path / "copy.gguf")
    with llama_cpp.opened(copy) as server:
        assert llama_cpp.greedy(server, PROMPT, 20) == greedy.tolist()
    copy.unlink()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 42"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n")
    texts = ["In 2024, 3.14 of ½ cafés\n\n  x_y=1;", "don't WE'LL 漢字 🙂\r\n", chat]
    printable = tokenizer.convert_tokens_to_ids("a")
    with llama_cpp.opened(real.file, context=256) as server:
        for text in texts:
            ids = tokenizer(text).input_ids
            by_text, by_ids = (llama_cpp.next_token(server, prompt, printable) for prompt in (text, ids))
            assert by_text == by_ids
            assert tokenizer.decode(ids) == text


def test_the_lm_loss_is_that_of_transformers(real: Real, data: PreparedData, pruned: Any) -> None:
    rows = tokens_of(data, "valid", EVALUATED)
    with torch.no_grad():
        logits = torch.cat([real.model(row[None, :-1]).logits for row in rows])
    losses = torch.nn.functional.cross_entropy(logits.double().transpose(1, 2), rows[:, 1:])
    assert pruned[1]["lm_loss_nats_before"] == pytest.approx(losses.item(), abs=1e-6)
    assert pruned[1]["eval_tokens"] == EVALUATED * SEQ_LENGTH


def expected_scores(model: Any, rows: Tensor) -> dict[str, Tensor]:
    """arXiv 2407.14679, section 2.2, (l2, mean), from hooks on transformers' model; rows [b, s]."""
    seen: dict[str, Tensor] = {}
    kept = []

    def keep(name: str, values: Tensor) -> None:
        seen[name] = values.detach()

    for name, module in model.named_modules():
        if name.endswith(("mlp.down_proj", "self_attn.o_proj")):
            kept.append(module.register_forward_pre_hook(lambda m, given, name=name: keep(name, given[0])))
        elif name.endswith(("layernorm", "model.norm")):
            kept.append(module.register_forward_hook(lambda m, given, out, name=name: keep(name, out)))
    with torch.no_grad():
        model.model(rows)
    for hook in kept:
        hook.remove()
    c = model.config
    per_head = (*rows.shape, c.num_attention_heads, -1)

    def of(suffix: str, change: Any = lambda x: x) -> Tensor:
        names = [f"model.layers.{layer}.{suffix}" for layer in range(c.num_hidden_layers)]
        return torch.stack([aggregate(change(seen[name]), "l2", "mean") for name in names])

    heads = of("self_attn.o_proj", lambda x: x.view(per_head).norm(dim=-1))
    norms = of("input_layernorm").sum(0) + of("post_attention_layernorm").sum(0)
    return {
        "ffn_hidden_size": of("mlp.down_proj"),
        "num_attention_heads": heads,
        "num_query_groups": heads.view(c.num_hidden_layers, c.num_key_value_heads, -1).sum(-1),
        "hidden_size": norms + aggregate(seen["model.norm"], "l2", "mean"),
    }


def test_the_scores_of_each_axis_are_those_of_hooks_on_transformers(
    real: Real, data: PreparedData, pruned: Any
) -> None:
    found = load_file(str(pruned[0] / "scores.safetensors"))
    expected = expected_scores(real.model, tokens_of(data, "train", CALIBRATION)[:, :-1])
    assert found.keys() >= expected.keys()
    for name, scores in expected.items():
        torch.testing.assert_close(
            found[name].double(), scores, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_from_file_to_file_it_is_the_same_student(
    commands: Commands, real: Real, pruned: Any, tmp_path: Path
) -> None:
    """As the pruning in memory and its export make it, byte for byte."""
    own = [f"source={pruned[0]}", "license=none", f"run_dir={commands.home}/real-exported"]
    exported = Path(commands.run("export", *own).result()["exported"])
    plan = PrunePlan.load(pruned[0] / "plan.json")
    files = streamed(real.directory, plan, tmp_path / "streamed")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    differing = [name for name, found in files.items() if found != (exported / name).read_bytes()]
    assert differing == []


def swapped(kept: list[int], other: list[int], scores: Tensor) -> list[str]:
    """Units that only one of two plans keeps, with their scores' relative gap to the nearest of the other's."""
    ours, theirs = sorted(set(kept) - set(other)), sorted(set(other) - set(kept))
    gaps = [(a, b, abs(scores[a] - scores[b]).item() / scores[b].abs().item()) for a in ours for b in theirs]
    assert all(gap < RELATIVE_GAP for *_, gap in gaps), gaps
    return [f"{a} for {b}: {gap:.1e}" for a, b, gap in gaps]


def test_three_tensor_parallel_ranks_keep_the_same_units(
    commands: Commands, real: Real, corpus: dict[str, Any], pruned: Any
) -> None:
    run_dir = commands.home / "real-tp3"
    own = [*pruning(real, corpus, run_dir), "trainer.tensor_model_parallel_size=3"]
    result = commands.run("prune", *own, nproc=3).result()
    assert result["lm_loss_nats_before"] == pytest.approx(pruned[1]["lm_loss_nats_before"], abs=1e-5)
    scores = load_file(str(pruned[0] / "scores.safetensors"))
    plans = [json.loads((run / "plan.json").read_text())["kept"] for run in (pruned[0], run_dir)]
    assert [plan["num_attention_heads"] for plan in plans] == [None, None]  # +conf=width leaves heads alone
    different = {"hidden_size": swapped(*(plan["hidden_size"] for plan in plans), scores["hidden_size"])}
    for layer, (ours, theirs) in enumerate(zip(*(plan["ffn_hidden_size"] for plan in plans), strict=True)):
        different[f"ffn_hidden_size {layer}"] = swapped(ours, theirs, scores["ffn_hidden_size"][layer])
    print({name: units for name, units in different.items() if units})
    if not any(different.values()):
        assert result["lm_loss_nats_after"] == pytest.approx(pruned[1]["lm_loss_nats_after"], abs=1e-4)


def trained(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "steps.jsonl").read_text().splitlines()
    return [entry for entry in map(unmeasured, lines) if entry["split"] == "train"]


def test_a_killed_distillation_has_the_losses_of_one_that_was_not(
    commands: Commands, real: Real, corpus: dict[str, Any], pruned: Any
) -> None:
    def command(run_dir: Path) -> list[str]:
        return [
            *("+conf=width", *overrides(corpus), f"student={pruned[0]}", f"teacher={real.file}"),
            *(
                f"distill.max_steps={STEPS}",
                f"distill.global_batch_size={BATCH}",
                "distill.optim.warmup_steps=1",
            ),
            *(
                f"distill.val_check_interval={STEPS // 2}",
                "distill.limit_val_batches=1",
                f"run_dir={run_dir}",
            ),
        ]

    straight, killed = commands.home / "real-straight", commands.home / "real-killed"
    result = commands.run("distill", *command(straight)).result()
    steps = killed / "steps.jsonl"
    commands.killed(
        "distill",
        *command(killed),
        log=commands.home / "real-killed.log",
        when=lambda seen: steps.exists() and len(trained(killed)) > STEPS // 2,
        timeout=500,
    )
    before = trained(killed)
    assert len(before) < STEPS
    resumed = commands.run("distill", *command(killed)).result()
    assert resumed["lm_loss_nats_after"] == result["lm_loss_nats_after"]
    expected = trained(straight)
    assert [entry["step"] for entry in expected] == list(range(STEPS))
    for entries in (before, trained(killed)):
        for entry, other in zip(entries, expected, strict=False):
            assert entry == other
            assert entry["tokens"] == BATCH * SEQ_LENGTH
    assert len(trained(killed)) == STEPS
    assert result["lm_loss_nats_teacher"] < result["lm_loss_nats_before"]
