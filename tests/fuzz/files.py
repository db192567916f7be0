"""Damaged and hostile files: how one is changed at random; `targets` has which."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz import gguf_changes

DEEP = "[" * 200_000
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2.5,
    1e308,
    float("nan"),
    float("inf"),
    10**25,
    "",
    "x",
    "x" * 5000,
]
VALUES += [
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    "../../etc/passwd",
    "/dev/zero",
    "é\u202e\n漢",
    "\ud800",
    -(10**25),
    "nan",
    "32",
]
EXTRA: list[tuple[str, Any]] = [
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", 3),
    ("auto_map", {"AutoConfig": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]}),
    ("rope_scaling", {"rope_type": "llama3", "factor": float("nan")}),
    ("rope_parameters", []),
    ("attn_implementation", "flash_attention_2"),
    ("torch_dtype", "float8"),
    ("torch_dtype", 5),
    ("dtype", "float16"),
    ("architectures", 7),
    ("tokenizer_class", "Evil"),
    ("max_position_embeddings", 2**40),
    ("vocab_size", 2**40),
    ("num_hidden_layers", 10**9),
    ("model_max_length", -5),
    ("added_tokens_decoder", {"x": 1}),
    ("extra_special_tokens", [1]),
    ("chat_template", [{"name": 1}]),
]
TEMPLATES = [
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x' * 10**10 }}",
    "{{ 'x' * 10**8 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ (10 ** 5000) | string }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ messages[99].content }}",
    "{{ messages[0].nothing.at.all }}",
    "{% include '/etc/passwd' %}",
    "{% for",
    "{{ 'x' | center(10**10) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ raise_exception('a\nb') }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ range(10**9) | list | length }}",
    "{{ (range(10**7) | list) | join }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 'a' | wordwrap(0) }}",
    "{{ messages | map(attribute='content') | sum }}",
    "{{ 1e308 * 10 }}{{ messages | batch(0) | list }}",
    "{{ '((((((((((a+)+)+)+)+)+)+)+)+)+)' | urlize }}",
    "(" * 5000,
    "{{" + "(" * 5000,
    "{{ " + " + ".join(["1"] * 20000) + " }}",
    "{" * 100_000,
    "",
    "no turns at all",
    "\ud83d",
]
DTYPES = ["F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "", "X", 3, None, []]


def change(rng: random.Random, kind: str, file: Path) -> str:
    """Change a file of a kind; what was done, in words."""
    if kind == "template":
        return _template(rng, file)
    if rng.random() < 0.15:
        return _replaced(rng, file)
    if kind == "bytes" or rng.random() < 0.12:
        return _bytes(rng, file)
    return {
        "json": _json,
        "index": _json,
        "yaml": _yaml,
        "jsonl": _jsonl,
        "safetensors": _safetensors,
        "pickle": _pickle,
        "gguf": gguf_changes.change,
    }[kind](rng, file)


def _replaced(rng: random.Random, file: Path) -> str:
    """Something else than a file is there, or an endless one."""
    ways: dict[str, Callable[[], Any]] = {
        "fifo": lambda: os.mkfifo(file),
        "directory": lambda: file.mkdir(),
        "zero": lambda: file.symlink_to("/dev/zero"),
        "loop": lambda: file.symlink_to(file),
        "gone": lambda: None,
        "empty": lambda: file.touch(),
        "sparse": lambda: _sparse(file),
    }
    way = rng.choice(sorted(ways))
    file.unlink()
    ways[way]()
    return f"replaced by {way}"


def _sparse(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(6 << 30)


def _bytes(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    way = rng.choice(["cut", "flip", "insert", "utf16", "bom", "nul"])
    at = rng.randrange(len(data))
    if way == "cut":
        data = data[:at]
    elif way == "flip":
        for _ in range(rng.choice([1, 1, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "insert":
        data[at:at] = rng.randbytes(rng.choice([1, 16, 4096]))
    elif way == "utf16":
        data = bytearray(data.decode("latin-1").encode("utf-16"))
    else:
        data = bytearray(b"\xef\xbb\xbf" if way == "bom" else b"\0" * 64) + data
    file.write_bytes(data)
    return f"bytes: {way} at {at}"


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in _nodes(item, (*path, key)))]


def _tree(rng: random.Random, value: Any) -> tuple[Any, str]:
    """One node replaced, removed or added."""
    nodes = [node for node in _nodes(value) if node]
    if not nodes or rng.random() < 0.05:
        new = rng.choice(VALUES)
        return new, f"whole = {str(new)[:40]!r}"
    # Shallow ones are what programs read.
    nodes = sorted(nodes, key=len)[: rng.choice([40, len(nodes)])]
    *up, last = rng.choice(nodes)
    parent = value
    for key in up:
        parent = parent[key]
    where = ".".join(map(str, [*up, last]))[:80]
    way = rng.choice(["set", "set", "set", "set", "remove", "add"])
    if way == "set":
        parent[last] = rng.choice(VALUES)
        return value, f"{where} = {str(parent[last])[:40]!r}"
    if way == "remove":
        del parent[last]
        return value, f"{where} removed"
    name, extra = rng.choice(EXTRA)
    if isinstance(value, dict):
        value[name] = extra
    return value, f"{name} = {str(extra)[:60]}"


def _json(rng: random.Random, file: Path) -> str:
    if rng.random() < 0.06:
        file.write_text(
            rng.choice([DEEP, '{"a":' * 100_000, "[" + "1," * 10**6 + "1]", "1" * 10_000, "{}", "nul"])
        )
        return "deep, long or none"
    value, done = _tree(rng, json.loads(file.read_text()))
    file.write_text(json.dumps(value))
    return done


def _yaml(rng: random.Random, file: Path) -> str:
    if rng.random() < 0.1:
        commands = [
            '!!python/object/apply:os.system ["touch owned"]',
            "a: &a [*a]",
            DEEP,
            "config: 3",
            "- 1",
            "a: 2020-13-45",
        ]
        file.write_text(rng.choice(commands))
        return "hostile"
    value, done = _tree(rng, yaml.safe_load(file.read_text()))
    file.write_text(yaml.safe_dump(json.loads(json.dumps(value)) if "\ud800" not in str(value) else {"x": 1}))
    return done


def _jsonl(rng: random.Random, file: Path) -> str:
    lines = file.read_text().splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.15:
        lines[at] = rng.choice([DEEP, "1", "null", "x" * 10**7, '{"a": NaN}', "\0", "{}", '"\\ud800"'])
        done = "odd"
    else:
        value, done = _tree(rng, json.loads(lines[at]))
        lines[at] = json.dumps(value)
    file.write_text("\n".join(lines) + "\n")
    return f"line {at + 1}: {done}"


def _safetensors(rng: random.Random, file: Path) -> str:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, 2**63, 2**40, length + 1, length - 1, len(data)])
        file.write_bytes(wrong.to_bytes(8, "little") + data[8:])
        return f"length of the header {wrong}"
    name = rng.choice([n for n in sorted(header) if n != "__metadata__"])
    way = rng.choice(["dtype", "offsets", "shape", "tree", "numbers", "metadata"])
    if way == "dtype":
        header[name]["dtype"] = rng.choice(DTYPES)
    elif way == "offsets":
        a, b = header[name]["data_offsets"]
        odd = [
            [b, a],
            [a, b + 1],
            [-1, b],
            [a, 2**63],
            [a],
            [a, b, b],
            [0.5, b],
            "x",
            None,
            [a + 4, b],
            [0, b],
            [a, 10**25],
        ]
        header[name]["data_offsets"] = rng.choice(odd)
    elif way == "shape":
        header[name]["shape"] = rng.choice([[-1], [0], [2**62, 2**62], [10**25], "x", None, [1.5], [[1]], []])
    elif way == "tree":
        header, _ = _tree(rng, header)
    elif way == "numbers":
        odd = rng.choice([b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f"])
        body = odd * (len(body) // 4)
    else:
        header["__metadata__"] = rng.choice(
            [None, 3, [], {"format": 3}, {"format": "tf"}, {"nemo_minitron.scores": "{}"}]
        )
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return f"{way} of {name}"


class _Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def _pickle(rng: random.Random, file: Path) -> str:
    way = rng.choice(["command", "bytes", "bytes", "bytes", "memory", "plain"])
    if way == "command":
        file.write_bytes(pickle.dumps(_Command()))
    elif way == "memory":  # a byte string whose length is said to be 2^40
        file.write_bytes(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.")
    elif way == "plain":
        file.write_bytes(pickle.dumps(rng.choice([None, 3, [], {}, {"a": float("nan")}])))
    else:
        return _bytes(rng, file)
    return way


def _template(rng: random.Random, file: Path) -> str:
    config = json.loads(file.read_text())
    template = rng.choice(TEMPLATES)
    config["chat_template"] = template
    file.write_text(json.dumps(config))
    return f"template {template[:60]!r}"
