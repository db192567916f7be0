"""Checkpoints made to run code or to reach outside, and such as lie about themselves, are refused with one line.

The plainer cases are in test_bad_input.py.
"""

import io
import json
import os
import pickle
import pickletools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.checkpoints.untrusted import table_of_contents
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from tests.functional.conftest import Teacher
from tests.support import ranks, sessions
from tests.support.commands import SEQ_LENGTH, VOCAB_SIZE, Commands

PATIENCE_S = 240


class Global:
    """Pickled, it is the global of that module and dotted name, called with `arguments`."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments

    def dumps(self) -> bytes:
        """By hand: pickle itself refuses names that are not where they say."""
        out = pickle.PROTO + bytes([4])
        for text in (self.module, self.name):
            out += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
        arguments = pickle.dumps(self.arguments, 4)
        out += pickle.STACK_GLOBAL + arguments[2:-1] + pickle.REDUCE + pickle.STOP
        pickletools.dis(out, io.StringIO())
        return out


@pytest.fixture(scope="module", autouse=True)
def models(commands: Commands, teacher: Teacher) -> None:
    """The teacher beside what is made of it."""
    (commands.home / "teacher-hf").symlink_to(teacher.huggingface)
    (commands.home / "teacher").symlink_to(teacher.run_dir)


def huggingface(home: Path, name: str) -> Path:
    shutil.copytree(home / "teacher-hf", home / "hostile" / name)
    return home / "hostile" / name


def nemo(home: Path, name: str) -> Path:
    shutil.copytree((home / "teacher" / "checkpoint").resolve(), home / "hostile" / name)
    return home / "hostile" / name


Make = Callable[[Path, str], Path]


def metadata(module: str, function: str) -> Make:
    """A table of contents that calls a function with a shell command."""

    def make(home: Path, name: str) -> Path:
        bad = nemo(home, name)
        hostile = Global(module, function, f"touch {home}/owned").dumps()
        (bad / "weights" / ".metadata").write_bytes(hostile)
        return bad

    return make


def common(make_bytes: Callable[[Path], bytes]) -> Make:
    def make(home: Path, name: str) -> Path:
        bad = nemo(home, name)
        (bad / "weights" / "common.pt").write_bytes(make_bytes(home))
        return bad

    return make


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def saved_command(home: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"state": Command(f"touch {home}/owned")}, file)
    return file.getvalue()


def file_with(name_of_file: str, content: str | bytes) -> Make:
    """A NeMo 2 directory with one file replaced."""

    def make(home: Path, name: str) -> Path:
        bad = nemo(home, name)
        data = content.encode() if isinstance(content, str) else content
        (bad / name_of_file).write_bytes(data)
        return bad

    return make


def aliases(home: Path, name: str) -> Path:
    """Nine levels of nine references: 700 bytes whose text form would be gigabytes."""
    bad = nemo(home, name)
    levels = ['a0: &a0 ["x","x","x","x","x","x","x","x","x"]']
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    text = (bad / "context" / "model.yaml").read_text()
    place = text.index("  activation_func:")
    use = "  activation_func:\n    _target_: os.system\n    command: *a9\n  old_activation_func:"
    text = "\n".join(levels) + "\n" + text[:place] + use + text[place + len("  activation_func:") :]
    (bad / "context" / "model.yaml").write_text(text)
    return bad


def index(content: Any) -> Make:
    def make(home: Path, name: str) -> Path:
        bad = huggingface(home, name)
        (bad / "model.safetensors").rename(bad / "part.safetensors")
        (bad / "model.safetensors.index.json").write_text(json.dumps(content))
        return bad

    return make


def header(content: Any) -> Make:
    def make(home: Path, name: str) -> Path:
        bad = huggingface(home, name)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (bad / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        return bad

    return make


def config(**values: Any) -> Make:
    def make(home: Path, name: str) -> Path:
        bad = huggingface(home, name)
        known = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**known, **values}))
        return bad

    return make


def tokenizer_code(home: Path, name: str) -> Path:
    """A tokenizer that asks for a class of the checkpoint's own, whose module runs a command."""
    bad = huggingface(home, name)
    (bad / "evil.py").write_text(
        f"import os\nos.system('touch {home}/owned')\n"
        "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): pass\n"
    )
    known = json.loads((bad / "tokenizer_config.json").read_text())
    known |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (bad / "tokenizer_config.json").write_text(json.dumps(known))
    return bad


def tokenizer_elsewhere(home: Path, name: str) -> Path:
    """A tokenizer whose files are said to lie outside; those inside are gone."""
    bad = huggingface(home, name)
    (bad / "tokenizer.json").rename(home / "hostile" / "outside.json")
    known = json.loads((bad / "tokenizer_config.json").read_text())
    known |= {"tokenizer_file": "../outside.json", "vocab_file": f"{home}/hostile/outside.json"}
    (bad / "tokenizer_config.json").write_text(json.dumps(known))
    return bad


NESTED = "[" * 200_000
CASES: dict[str, tuple[Make, list[str]]] = {
    # Allowed packages, but not their functions, nor what their modules import.
    "a function": (metadata("os", "system"), [".metadata", "os.system"]),
    "through torch": (
        metadata("torch.distributed.checkpoint.filesystem", "os.system"),
        [".metadata", "filesystem.os.system"],
    ),
    "through pathlib": (metadata("pathlib", "os.system"), [".metadata", "pathlib.os.system"]),
    "through torch itself": (metadata("torch", "os.system"), [".metadata", "torch.os.system"]),
    "through an import": (
        metadata("megatron.core.dist_checkpointing.strategies.torch", "pickle.loads"),
        [".metadata", "pickle.loads"],
    ),
    "torch's converter": (
        metadata("torch.distributed.checkpoint.format_utils", "torch_save_to_dcp"),
        [".metadata", "torch_save_to_dcp"],
    ),
    "a function of torch": (metadata("torch", "load"), [".metadata", "torch.load"]),
    "common.pt": (common(saved_command), ["common.pt", "not safe"]),
    "common.pt as a plain pickle": (
        common(lambda home: pickle.dumps(Command(f"touch {home}/owned"))),
        ["common.pt", "not safe"],
    ),
    "common.pt cut": (common(lambda home: b"PK\x03\x04"), ["common.pt", "damaged"]),
    "another backend": (
        file_with("weights/metadata.json", '{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
        ["metadata.json", "zarr", "torch_dist"],
    ),
    "metadata.json a list": (file_with("weights/metadata.json", "[]"), ["metadata.json", "JSON object"]),
    "yaml too deep": (file_with("context/model.yaml", NESTED), ["model.yaml", "cannot be read"]),
    "yaml of no model": (file_with("context/model.yaml", "config: 3"), ["model.yaml", "cannot be read"]),
    "yaml aliases": (aliases, ["model.yaml", "aliases"]),
    "index absolute": (index({"weight_map": {"a": "/etc/part.safetensors"}}), ["/etc/part.safetensors"]),
    "index upwards": (index({"weight_map": {"a": "../x/model.safetensors"}}), ["../x/model.safetensors"]),
    "index of pickles": (index({"weight_map": {"a": "pytorch_model.bin"}}), ["pytorch_model.bin", "plain"]),
    "index of numbers": (index({"weight_map": {"a": 3}}), ["index.json", "weight_map"]),
    "index of nothing": (index({"weight_map": {}}), ["index.json", "weight_map"]),
    "index a list": (index({"weight_map": ["part.safetensors"]}), ["index.json", "weight_map"]),
    "header a list": (header([1, 2]), ["model.safetensors", "half-written"]),
    "header empty": (header({}), ["model.safetensors", "half-written"]),
    "header too deep": (header(NESTED.encode()), ["model.safetensors", "half-written"]),
    "another width": (config(intermediate_size=256), ["mlp.gate_proj", "[128, 64]", "[256, 64]"]),
    "more layers": (config(num_hidden_layers=5), ["lack", "model.layers.4"]),
    "other heads": (config(num_key_value_heads=2), ["k_proj", "[32, 64]", "[16, 64]"]),
    "tokenizer with code": (tokenizer_code, ["tokenizer", "cannot be loaded"]),
    "tokenizer elsewhere": (tokenizer_elsewhere, ["tokenizer"]),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(commands: Commands, teacher: Teacher, name: str) -> None:
    """What every recipe does with a source before anything else; that it ends with exit code 2: test_bad_input.py."""
    make, says = CASES[name]
    path = make(commands.home, name.replace(" ", "-").replace("'", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            load_tokenizer(find_source(path).tokenizer)
    assert not (commands.home / "owned").exists(), "a checkpoint ran a command"
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert len(line) < 600
    for part in says:
        assert part in line


class Member:
    """Pickled as an enum's member by Python 3.11.0 to 3.11.3."""

    def __init__(self, of: type, name: str) -> None:
        self.arguments = (of, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


def test_an_enum_s_member_is_read_as_any_python_writes_it(tmp_path: Path) -> None:
    """A class's attribute is not: it could be a function."""
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(Metadata({"weight": Member(WriteItemType, "TENSOR")})))
    assert table_of_contents(file, "x").state_dict_metadata == {"weight": WriteItemType.TENSOR}
    for of, name in ((WriteItemType, "__reduce__"), (Metadata, "__init__"), (torch.Size, "numel")):
        file.write_bytes(pickle.dumps(Metadata({"weight": Member(of, name)})))
        with pytest.raises(InputError, match="not safe to open"):
            table_of_contents(file, "x")


def test_what_the_hostile_pickles_would_do(tmp_path: Path) -> None:
    """They are what they are taken for: Python's own unpickler runs them."""
    for module in ("os", "pathlib", "torch.distributed.checkpoint.filesystem"):
        name = "system" if module == "os" else "os.system"
        pickle.loads(Global(module, name, f"touch {tmp_path}/{module}").dumps())
        assert (tmp_path / module).exists()


def test_the_context_s_classes_are_not_made(commands: Commands, teacher: Teacher) -> None:
    """A checkpoint whose context/io.json and whose unused parts of model.yaml name commands opens, and runs none."""
    source = nemo(commands.home, "context")
    target = {"_target_": "os.system", "command": f"touch {commands.home}/owned"}
    for file in (source / "context").glob("io.json"):
        known = json.loads(file.read_text())
        names = [key for key, value in known["objects"].items() if isinstance(value, dict)]
        for key in names:
            known["objects"][key]["type"] = {"type": "ref", "module": "os", "name": "system"}
        assert names
        file.write_text(json.dumps(known))
    model = source / "context" / "model.yaml"
    model.write_text(model.read_text() + f"optim: {json.dumps(target)}\nextra: {json.dumps(target)}\n")
    tokens = torch.randint(VOCAB_SIZE, (4, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(4))
    losses = [
        ranks.run_on_ranks(1, sessions.loss_under, str(path), tokens, {}, timeout=PATIENCE_S)[0]
        for path in (source, teacher.run_dir)
    ]
    assert losses[0] == losses[1]
    assert not (commands.home / "owned").exists()
