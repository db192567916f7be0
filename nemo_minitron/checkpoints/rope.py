"""Rotary embeddings as a config.json states them: transformers 4's keys and transformers 5's, one meaning.

transformers 4 has `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside the other keys; transformers 5 has
all of them in `rope_parameters`, and still reads the older form.
"""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.config_values import positive_integer, positive_number, short
from nemo_minitron.errors import InputError

_BASE = 10000.0
# Of the families, only Nemotron rotates a part of each head; transformers 4.51.3's default.
_NEMOTRON_PART = 0.5
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary fields of an `Architecture`.

    Args:
        config: a config.json of a known `model_type`.

    Raises:
        InputError: a kind of scaling that NeMo's model of the family has not, a key that this does not read, the same
            thing stated twice and differently, a number out of its range.
    """
    name, values = config["model_type"], _gathered(config, where)
    kind = _kind(values, where)
    if kind != "default" and name != "llama":
        raise InputError(
            f"{where}: rope_scaling {short(kind)}: is not converted for {name}, only llama's 'llama3' is"
        )
    if kind not in ("default", "llama3"):
        raise InputError(f"{where}: rope_scaling {short(kind)}: only 'llama3' is known")
    legal = _ALWAYS + (_LLAMA3_KEYS if kind == "llama3" else ())
    if unknown := sorted(set(values) - set(legal)):
        raise InputError(
            f"{where}: rope_scaling {kind!r}: key {short(unknown[0])} is not known; known: {', '.join(legal)}"
        )
    return {
        "rotary_base": positive_number(values.get("rope_theta", _BASE), "rope_theta", where),
        "rotary_percent": _part(values.get("partial_rotary_factor"), name, where),
        **(_llama3(values, where) if kind == "llama3" else {}),
    }


def _gathered(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All that the file says of rotary embeddings, by transformers 5's names; null is the same as not said."""
    gathered: dict[str, Any] = {}
    beside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for key, part in (
        ("rope_parameters", config.get("rope_parameters")),
        ("rope_scaling", config.get("rope_scaling")),
        ("config.json", beside),
    ):
        if part is not None and not isinstance(part, Mapping):
            raise InputError(f"{where}: {key}={short(part)}: must be a mapping or null")
        for name, value in (part or {}).items():
            if isinstance(value, Mapping):
                raise InputError(
                    f"{where}: {key}.{name} is a mapping: rotary embeddings by layer type are not converted"
                )
            if value is None:
                continue
            said = gathered.setdefault(name, value)
            if said is not value and said != value:  # NaN differs from itself
                raise InputError(
                    f"{where}: {name}={short(value)} in {key}, but {short(said)} in rope_parameters"
                )
    return gathered


def _kind(values: Mapping[str, Any], where: str) -> Any:
    kinds = [values[key] for key in ("rope_type", "type") if key in values]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise InputError(f"{where}: rope_scaling: rope_type {short(kinds[0])}, but type {short(kinds[1])}")
    return kinds[0] if kinds else "default"


def _part(value: Any, name: str, where: str) -> float:
    part = (_NEMOTRON_PART if name == "nemotron" else 1.0) if value is None else value
    part = positive_number(part, "partial_rotary_factor", where)
    if part > 1 or (part < 1 and name != "nemotron"):
        legal = "at most 1" if name == "nemotron" else f"1: a {name} model rotates whole heads"
        raise InputError(f"{where}: config.json: partial_rotary_factor={part}: must be {legal}")
    return part


def _llama3(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As `_compute_llama3_parameters` of transformers reads it, where none of the four has a default."""
    for key in _LLAMA3_KEYS:
        if key not in values:
            raise InputError(f"{where}: rope_scaling 'llama3' lacks {key}")
    factor, low, high = (
        positive_number(values[key], f"rope_scaling.{key}", where) for key in _LLAMA3_KEYS[:3]
    )
    if factor < 1:
        raise InputError(f"{where}: config.json: rope_scaling.factor={factor}: must be at least 1")
    if low >= high:
        raise InputError(
            f"{where}: config.json: rope_scaling.low_freq_factor={low}: must be below high_freq_factor={high}"
        )
    context = positive_integer(values[_LLAMA3_KEYS[3]], f"rope_scaling.{_LLAMA3_KEYS[3]}", where)
    return {
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_context": context,
    }


def config_of(a: Architecture) -> dict[str, Any]:
    """What a config.json has to say of an architecture's rotary embeddings, in the form that both versions read."""
    values: dict[str, Any] = {"rope_theta": a.rotary_base}
    if a.model_type == "nemotron":
        values["partial_rotary_factor"] = a.rotary_percent
    if a.rope_scaling_factor is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": a.rope_scaling_factor,
            "low_freq_factor": a.rope_low_freq_factor,
            "high_freq_factor": a.rope_high_freq_factor,
            "original_max_position_embeddings": a.rope_original_context,
        }
    return values
