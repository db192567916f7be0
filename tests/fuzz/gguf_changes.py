"""A GGUF file with other bytes in its header, or with other values in it, written anew by gguf's own writer."""

import random
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Of

SINGLE: list[tuple[Any, Any]] = [
    *((value, Of.UINT32) for value in (0, 1, 7, 64, 2**31, 2**32 - 1)),
    *((value, Of.INT32) for value in (-1, 0, -(2**31))),
    *((value, Of.UINT64) for value in (1, 2**40, 2**63)),
    *((value, Of.FLOAT32) for value in (float("nan"), float("inf"), -1.0, 0.0, 1e-30, 1e30, 0.5)),
    *(
        (value, Of.STRING)
        for value in ("", "x", "x" * 5000, "../../etc/passwd", "llama", "gpt2", "\u00e9\u202e\n")
    ),
    *((value, Of.BOOL) for value in (True, False)),
]
SEVERAL: list[tuple[list[Any], Any]] = [
    ([1, 2, 3], Of.INT32),
    ([0.5, float("nan")], Of.FLOAT32),
    (["a", "a", ""], Of.STRING),
    ([0] * 100_000, Of.INT32),
    (["x" * 1000] * 500, Of.STRING),
]
ELEMENTS: dict[Any, list[Any]] = {
    Of.STRING: ["", "x", " ", "a b", "a b c", "x" * 5000, "<|end|>"],
    Of.INT32: [-1, 0, 99, 2**31 - 1],
    Of.FLOAT32: [float("nan"), float("inf"), -1e30],
}


def change(rng: random.Random, file: Path) -> str:
    """Change a file; what was done, in words."""
    return _bytes(rng, file) if rng.random() < 0.5 else _values(rng, file)


def _bytes(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    header = len(data) - sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    at = rng.randrange(rng.choice([64, header, header]))
    way = rng.choice(["flip", "flip", "number", "cut", "insert"])
    if way == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "number":
        size = rng.choice([4, 8])
        odd = rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]) % 2 ** (8 * size)
        data[at : at + size] = odd.to_bytes(size, "little")
    elif way == "cut":
        data = data[:at]
    else:
        data[at:at] = rng.randbytes(rng.choice([1, 8, 4096]))
    file.write_bytes(data)
    return f"header: {way} at {at}"


def _values(rng: random.Random, file: Path) -> str:
    reader = gguf.GGUFReader(file)
    values = {
        key: (entry.contents(), entry.types[0], entry.types[-1])
        for key, entry in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    architecture = values.pop("general.architecture")[0]
    key = rng.choice(sorted(values))
    value, kind, of = values[key]
    way = rng.choice(["set", "set", "several", "remove", "add", "element", "element"])
    if way == "element" and kind == Of.ARRAY and of in ELEMENTS:
        value = list(value)
        value[rng.randrange(len(value))] = rng.choice(ELEMENTS[of])
        values[key] = value, kind, of
    elif way == "remove":
        del values[key]
    elif way == "several":
        several, of = rng.choice(SEVERAL)
        values[key] = several, Of.ARRAY, of
    else:
        key = (
            rng.choice([f"{architecture}.rope.scaling.type", "general.alignment", "x.y"])
            if way == "add"
            else key
        )
        single, kind = rng.choice(SINGLE)
        values[key] = single, kind, kind
    if rng.random() < 0.05:
        architecture = rng.choice(["", "gpt2", "x" * 5000, "qwen3"])
    _write(rng, reader, file, architecture, values)
    return f"{way} {key} = {str(values.get(key, [None])[0])[:60]!r}"


def _write(rng: random.Random, reader: Any, file: Path, architecture: str, values: dict[str, Any]) -> None:
    changed = file.with_suffix(".changed")
    writer = gguf.GGUFWriter(changed, architecture)
    for key, (value, kind, of) in values.items():
        writer.add_key_value(key, value, kind, of if kind == Of.ARRAY else None)
    left_out = rng.choice([*range(len(reader.tensors)), *[-1] * 100])
    for number, tensor in enumerate(reader.tensors):
        if number != left_out:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    changed.replace(file)
