"""What the campaigns work on: a toy model in both forms, a corpus and the other files that recipes take."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, VOCABULARY = 256, 300
_WORDS = [
    "the",
    "model",
    "reads",
    "what",
    "a",
    "student",
    "writes",
    "and",
    "a",
    "teacher",
    "says",
    "of",
    "it",
    "in",
    "words",
    "that",
    "are",
    "not",
    "many",
]


# Of the distillation whose teacher's states are cached.
CACHED = [
    "distill.max_steps=4",
    "distill.global_batch_size=2",
    "distill.val_check_interval=4",
    "distill.limit_val_batches=1",
]


@dataclass(frozen=True)
class Places:
    """A home directory with everything in it. `paths` by what it is, also those that are no files."""

    home: Path

    @property
    def huggingface(self) -> Path:
        return self.home / "hf"

    @property
    def nemo(self) -> Path:
        return self.home / "nemo"

    def odd_paths(self) -> list[str]:
        """What may be there instead of a file."""
        odd = self.home / "odd"
        return [
            *map(str, sorted(odd.iterdir())),
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            "/proc/nowhere/at/all",  # not even root can make it
        ]

    def base(self, recipe: str, model: Path | None = None) -> list[str]:
        """Overrides that the recipe accepts; `model`: instead of the toy."""
        model = model or (self.huggingface if recipe == "evaluate_instruct" else self.nemo)
        data = [
            "data=files",
            f"data.train={self.home}/train.txt",
            f"data.valid={self.home}/valid.txt",
            "data.seq_length=64",
            "eval.samples=4",
            "trainer.micro_batch_size=2",
            "trainer.global_batch_size=2",
        ]
        align = [
            f"student={model}",
            "align.global_batch_size=2",
            f"align.train={self.home}/{{}}.jsonl",
            f"align.valid={self.home}/{{}}-valid.jsonl",
            "data.seq_length=128",
        ]
        own = {
            "prune": ["+conf=width", f"source={model}", "prune.calibration_samples=4"],
            "search": [f"source={model}", "prune.calibration_samples=4", "search.slack=0.9"],
            "distill": [f"student={model}", f"teacher={model}"],
            "cache_teacher": [f"teacher={model}", "distill.max_steps=4"],
            "correct_teacher": [f"teacher={model}"],
            "synthesize": [f"teacher={model}", "synthesize.max_new_tokens=40"],
            "sft": [line.format("conversations") for line in align],
            "preference": [line.format("preferences") for line in align],
            "export": [f"source={model}", "license=none"],
            "report": [f"source={self.home}/reported"],
            "compare": [f"models=[{model}]", "compare.prompt_tokens=8", "compare.new_tokens=4"],
            "merge": [f"models=[{self.huggingface},{self.huggingface}]", "license=none"],
            "evolve": [
                f"models=[{self.nemo},{self.huggingface}]",
                *("license=none", "merge=linear", "evolve.space=layers"),
                *("evolve.generations=1", "evolve.population=2", "evolve.samples=2"),
            ],
            "evaluate_instruct": [f"source={model}", f"instruct.file={self.home}/instruct.jsonl"],
            "instruct_data": [f"instruct_data.input={self.home}/conversations.jsonl"],
            "pretrain": [
                "trainer.max_steps=1",
                f"data.vocab_size={VOCABULARY}",
                *(f"model.{k}={v}" for k, v in _MEGATRON_SIZES.items()),
            ],
        }
        return [*data, *own.get(recipe, [f"source={model}"])]


_MEGATRON_SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
}


def make_places(home: Path) -> Places:
    """All of it, made once: a home that has it is taken as it is."""
    places = Places(home)
    if (home / "made").exists():
        return places
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    _texts(home)
    _model(home)
    _run(home)
    _odd(home / "odd")
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.config.recipes import DataConfig
    from nemo_minitron.workflows.preflight import converted

    made = converted(find_source(places.huggingface), DataConfig(cache_dir=str(home / "made-cache")))
    shutil.copytree(made.path, places.nemo)
    (home / "run" / "checkpoint").symlink_to(places.nemo)
    _cache(places)
    _gguf(home / "model.gguf")
    (home / "made").touch()
    return places


_OF_A_RANK = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _cache(places: Places) -> None:
    """A teacher's states by the recipe itself, which ends well."""
    base = [text for text in places.base("cache_teacher") if not text.startswith("distill.")]
    command = [sys.executable, str(ROOT / "recipes" / "cache_teacher.py"), *base, *CACHED]
    # Without what the conversion of the model, in this process, has said about its own single rank.
    environment = {k: v for k, v in os.environ.items() if k not in _OF_A_RANK}
    done = subprocess.run(
        [*command, f"run_dir={places.home / 'cached'}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def _gguf(file: Path) -> None:
    from gguf import GGMLQuantizationType as Kind

    from tests.support import gguf_files

    rules = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    bpe = gguf_files.byte_level(gguf_files.TEXT, 340, rules)
    model = gguf_files.make_model("llama", bpe.get_vocab_size())
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    vocabulary = {**gguf_files.gpt2_vocabulary(bpe, "gpt-2"), "tokenizer.chat_template": template}
    gguf_files.write_gguf(file, model, Kind.F16, vocabulary)


def _texts(home: Path) -> None:
    text = " ".join(_WORDS * 300)
    (home / "train.txt").write_text(text)
    (home / "valid.txt").write_text(" ".join(_WORDS[::-1] * 300))
    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a model"}]
    pair = {"messages": turns[:1], "chosen": "a model", "rejected": "a word"}
    rewards = {"chosen_reward": 1.0, "rejected_reward": 0.0}
    asked = {"messages": turns, "category": "instruction", "checks": [{"kind": "equals", "text": "a model"}]}
    question = {"question": "what is it", "choices": ["a model", "a word"], "answer": 0}
    for name, row in (
        ("conversations", {"messages": turns}),
        ("preferences", {**pair, **rewards}),
        ("instruct", asked),
        ("task", question),
        ("prompts", {"prompt": "the model"}),
        ("corpus", {"text": text[:400]}),
    ):
        (home / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
        (home / f"{name}-valid.jsonl").write_text(f"{json.dumps(row)}\n" * 4)


def _model(home: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.data.tokenizer import train_bpe

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )
    texts = [(home / "train.txt").read_text(), " ".join(map(str, range(3000)))]
    tokenizer, model = train_bpe(texts, VOCABULARY, home / "hf"), LlamaForCausalLM(config)
    # One that knows less than the frequency of tokens is refused where it is to teach.
    ids, optimizer = (
        torch.tensor(tokenizer(texts[0])["input_ids"]),
        torch.optim.Adam(model.parameters(), 3e-3),
    )
    for _ in range(20):
        rows = ids[: len(ids) // 64 * 64].view(-1, 64)[:8]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(home / "hf")


def _run(home: Path) -> None:
    """Scores, a plan, a teacher's text and a teacher's cache, each as the recipes leave it."""
    import torch

    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.importance.scores import Scores
    from nemo_minitron.pruning import Kept, PrunePlan

    source = find_source(home / "hf")
    a, g = source.architecture, torch.Generator().manual_seed(1)
    shapes: dict[str, Any] = {
        "ffn_hidden_size": (a.num_layers, a.ffn_hidden_size),
        "num_attention_heads": (a.num_layers, a.num_attention_heads),
        "num_query_groups": (a.num_layers, a.num_query_groups),
        "hidden_size": (a.hidden_size,),
        "layers/block_influence": (a.num_layers,),
    }
    tensors = {name: torch.rand(*shape, generator=g) for name, shape in shapes.items()}
    Scores(a, source.sha256(), "l2", "mean", 4, 256, "d", tensors).save(home / "scores.safetensors")
    (home / "run").mkdir()
    for directory in (home, home / "run"):
        PrunePlan(source.sha256(), a, a.replace(num_layers=1), {}, Kept(layers=[0])).save(
            directory / "plan.json"
        )
    (home / "reported").mkdir()
    finished = {
        "recipe": "prune",
        "source": str(home / "hf"),
        "lm_loss_nats_before": 2.0,
        "lm_loss_nats_after": 3.0,
    }
    (home / "reported" / "result.json").write_text(json.dumps(finished))
    (home / "sdg" / "text").mkdir(parents=True)
    shutil.copy(home / "corpus.jsonl", home / "sdg" / "text" / "train.jsonl")
    for run in ("sdg", "run"):
        (home / run).mkdir(exist_ok=True)
        (home / run / "result.json").write_text("{}")
    models = [{"model": str(home / "hf"), "parameters": {"weight": weight}} for weight in ([0.2, 0.8], 0.5)]
    merge = {
        "models": models,
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"normalize": True},
    }
    (home / "merge.yaml").write_text(yaml.safe_dump(merge))


def _odd(odd: Path) -> None:
    odd.mkdir()
    os.mkfifo(odd / "fifo")
    (odd / "directory").mkdir()
    (odd / "empty").touch()
    (odd / "loop").symlink_to(odd / "loop")
    (odd / "dangling").symlink_to(odd / "gone")
    (odd / "zero").symlink_to("/dev/zero")
    (odd / "binary").write_bytes(bytes(range(256)) * 16)
    with open(odd / "sparse.json", "wb") as file:
        file.truncate(6 << 30)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(odd / "socket"))
