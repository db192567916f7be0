"""Which library makes the matrix products of a run on CPUs, and the record of it in the run directory.

Measured with one thread, torch 2.13.0. float32: on an AMD EPYC MKL, the BLAS of torch's CPU builds, does 88 to 106
GFLOP/s where oneDNN does 167 to 232; on an Intel Xeon (AVX-512) MKL is as fast or faster. bfloat16: a processor without
instructions for it does 25 to 30 GFLOP/s (that Xeon), where widening to float32 and back gets most of float32's speed.

The processor decides, so all ranks on one kind of machine decide alike; the record makes that so for all others, and
after a resume. NEMO_MINITRON_PRODUCTS: auto, onednn (float32 there whatever the processor), mkl (torch as it is).
"""

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.files import write_text

SWITCH = "NEMO_MINITRON_PRODUCTS"
RECORD = "cpu_products.json"
_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
logger = logging.getLogger("nemo_minitron")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Who makes the products of a dtype.

    float32: "torch" (as it is: MKL in CPU builds for x86) or "onednn". bfloat16: "torch" or "float32" (widened).
    """

    float32: str = "torch"
    bfloat16: str = "torch"
    processor: str = "unknown"
    decided_by: str = "processor"

    def __post_init__(self) -> None:
        if self.float32 not in ("torch", "onednn") or self.bfloat16 not in ("torch", "float32"):
            raise ValueError(f"float32 by {self.float32!r}, bfloat16 by {self.bfloat16!r}")

    def __str__(self) -> str:
        return f"float32 by {self.float32}, bfloat16 by {self.bfloat16}"


_current: Choice | None = None


def current() -> Choice:
    """The choice of this process: that of `settle`, else the processor's."""
    return _current or choose()


def choose() -> Choice:
    """By NEMO_MINITRON_PRODUCTS and the processor.

    Raises:
        InputError: another value of the variable.
    """
    asked = os.environ.get(SWITCH) or "auto"
    if asked not in ("auto", "onednn", "mkl"):
        raise InputError(f"{SWITCH}={asked}: auto, onednn and mkl are legal")
    vendor, name, flags = processor()
    decided_by = "processor" if asked == "auto" else f"{SWITCH}={asked}"
    if asked == "mkl" or not vendor:
        return Choice(processor=name, decided_by=decided_by)
    onednn = asked == "onednn" or vendor == "AuthenticAMD"
    return Choice(
        "onednn" if onednn else "torch",
        "torch" if flags & _BFLOAT16 else "float32",
        name,
        decided_by,
    )


@functools.cache
def processor() -> tuple[str, str, set[str]]:
    """Vendor, model and features of the first core of an x86 under Linux; empty for all others."""
    fields: dict[str, str] = {}
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name", "unknown")
    return fields.get("vendor_id", ""), name, set(fields.get("flags", "").split())


def settle(directory: Path, *, write: bool) -> Choice:
    """The run's choice: the record's, which is made where there is none or the variable says otherwise.

    Args:
        directory: the run's.
        write: whether this process may write (rank 0).

    Raises:
        InputError: as `choose`, and a record that is damaged.
    """
    global _current
    choice, kept = choose(), _read(directory / RECORD)
    if kept is not None and (choice.decided_by == "processor" or not write):
        choice = kept
    elif write:
        text = json.dumps(dataclasses.asdict(choice), indent=2) + "\n"
        write_text(directory / RECORD, text)
    _current = choice
    return choice


def _read(file: Path) -> Choice | None:
    try:
        fields: Any = json.loads(file.read_text())
        return Choice(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise InputError(
            f"{file}: not a record of products ({error}); remove it to choose by the processor"
        ) from None
