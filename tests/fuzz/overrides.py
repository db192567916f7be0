"""Random settings: every key of a recipe's schema with values that no one should give."""

import dataclasses
import random
import typing
from collections.abc import Iterator

NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "1.5",
    "-0.0",
    "1e-320",
    "1e308",
    "1e400",
]
NUMBERS += [
    "9" * 25,
    "-" + "9" * 25,
    "9" * 400,
    "9" * 5000,
    "4294967296",
    "2147483648",
    "0x10",
    "1_000",
    "1/2",
    "1/0",
]
NUMBERS += ["3/4", "1e-999999", "true", "false", "null"]
TEXTS = [
    "''",
    "x",
    "auto",
    "none",
    "late",
    "32",
    "~",
    "a=b",
    "'a b'",
    "'/proc/../proc/nowhere'",
    "'é ü 漢字 ‮'",
    "'a\\nb'",
    ".",
]
TEXTS += [
    "x" * 300,
    "x" * 5000,
    "'" + "/x" * 2500 + "'",
    "'**/*'",
    "'[a'",
    "'{}'",
    "'{{ 1/0 }}'",
    "C:\\x",
    "-x",
    "???",
]
SHAPES = [
    "[]",
    "{}",
    "[1]",
    "[[1]]",
    "[null]",
    "[-1,0]",
    "[0,0]",
    "[a,b]",
    "{a:1}",
    "{a:[1]}",
    "{1:1}",
    "{a:{b:c}}",
]
SHAPES += ["[nan]", "[1.5]", "[" + "9" * 25 + "]", "[" * 40 + "]" * 40, "{hidden_size:5}", "{hidden_size:[]}"]
SHAPES += [
    "{hidden_size:[nan,null,{},[]]}",
    "{parameters:{}}",
    "{parameters:nan}",
    "{parameters:" + "9" * 400 + "}",
]
SHAPES += ["{flops_per_token:[1]}", "{x:1}", "{num_layers:[1,1/2,'1/0']}", "[" + ",".join(["1"] * 3000) + "]"]
INTERPOLATIONS = [
    "${oc.env:HOME}",
    "${oc.env:NOWHERE}",
    "${now:%Y}",
    "${seed}",
    "${data.seed}",
    "${nowhere}",
    "${.x}",
]
INTERPOLATIONS += [
    "${repository:}",
    "${unless:a,b}",
    "${unless:1}",
    "${for_recipe:[a],b,c}",
    "${for_recipe:1}",
]
INTERPOLATIONS += [
    "${oc.decode:'[1'}",
    "${oc.create:{a:1}}",
    "${hydra:job.name}",
    "${eval:1}",
    "${",
    "${a",
    "${oc.env:}",
]


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema, groups included."""
    for name, hint in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}"
        inner = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        for kind in inner:
            yield from keys(typing.cast(type, kind), f"{prefix}{name}.")


def draw(rng: random.Random, known: list[str], paths: list[str]) -> list[str]:
    """One to three overrides."""
    return [_one(rng, known, paths) for _ in range(rng.choice([1, 1, 1, 2, 3]))]


def _one(rng: random.Random, known: list[str], paths: list[str]) -> str:
    key = rng.choice(known)
    if key in ("run_dir", "cluster"):  # +cluster=NAME is the launcher's
        key = "seed"
    sign = rng.choices(["", "++", "~", "+"], [80, 17, 2, 1])[0]
    if sign == "~":
        return f"~{key}"
    pools: list[list[str]] = [NUMBERS, TEXTS, SHAPES, INTERPOLATIONS, [f"'{path}'" for path in paths]]
    value = rng.choice(rng.choices(pools, [35, 15, 20, 10, 20])[0])
    return f"{sign or '++'}{key}={value}" if key.startswith("cluster.") else f"{sign}{key}={value}"
