"""supply_chain/ is of the pins in constraints.txt and constraints-newest.txt; `make supply-chain` makes it anew."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "supply_chain"
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}")
# The environment's own tools, and torch, of which the build for the CPU is installed.
NOT_PINNED = {"pip", "setuptools", "torch"}


def normal(name: str, version: str) -> tuple[str, str]:
    return re.sub(r"[-_.]+", "-", name).lower(), version


def pins(file: str = "constraints.txt") -> set[tuple[str, str]]:
    """(name, version) of each line of such a file."""
    lines = (ROOT / file).read_text().splitlines()
    wanted = (line.partition(";")[0].strip() for line in lines if line and not line.startswith("#"))
    return {normal(*line.split("==")) for line in wanted}


@pytest.mark.parametrize("suffix", ["", "-newest"])
def test_each_pin_has_the_hashes_of_its_files(suffix: str) -> None:
    blocks = (MADE / f"hashes{suffix}.txt").read_text().replace("\\\n", " ").splitlines()
    found = {normal(*block.split()[0].split("==")): SHA256.findall(block) for block in blocks}
    assert set(found) == pins(f"constraints{suffix}.txt")
    assert all(found.values())


def test_the_newest_pins_are_those_that_differ() -> None:
    newest, tried = pins("constraints-newest.txt"), pins()
    assert newest.isdisjoint(tried)
    assert {name for name, _ in newest} <= {name for name, _ in tried}


def test_the_licences_and_the_sbom_are_of_the_pins() -> None:
    rows = list(csv.DictReader((MADE / "licences.csv").open()))
    listed = {normal(row["Name"], row["Version"]) for row in rows}
    parts = json.loads((MADE / "sbom.json").read_text())["components"]
    components = {normal(part["name"], part["version"]) for part in parts}
    for found in (listed, components):
        assert len(found) > 150
        assert {pin for pin in found if pin[0] not in NOT_PINNED} <= pins()
    assert {name for name, _ in listed ^ components} <= NOT_PINNED
    # Its metadata says nothing; the repository's LICENSE is Apache-2.0.
    assert {row["Name"] for row in rows if row["License"] == "UNKNOWN"} == {"nemo_run"}
