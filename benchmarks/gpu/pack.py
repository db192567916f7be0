"""The wheels that a machine with CUDA's torch lacks, for one that reaches no package index.

    python3.12 benchmarks/gpu/pack.py DIR [--megabytes 44]

Writes DIR/wheels/*.whl and DIR/piece0.tar, piece1.tar, ... of at most so many MiB, with the versions of constraints.txt
and without their dependencies: torch, numpy, pyarrow, protobuf and what else the machine has must stay its own (numpy
1.26 breaks a newer scipy there, protobuf 5 a newer onnx). Run it under the machine's Python version, since
megatron-core is built. There: `for p in piece*.tar; do tar xf $p; done`,
`pip install --no-index --no-deps --no-compile --target pkgs
wheels/*.whl`, `export PYTHONPATH=pkgs`.
Run on one NVIDIA H200 with Python 3.12.3 and torch 2.11 (as one .tar.xz of what they install).
"""

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [
    "jieba",
    "pulp",
    "transformers",
    "nemo_toolkit",
    "cryptography",
    "tokenizers",
    "opencc",
    "megatron-core",
    "pydantic_core",
    "libcst",
    "nvidia-modelopt",
    "nltk",
    "pynacl",
    "lightning",
    "wcwidth",
    "huggingface_hub",
    "pydantic",
    "datasets",
    "nvidia-resiliency-ext",
    "fiddle",
    "prompt_toolkit",
    "bcrypt",
    "torchx",
    "cffi",
    "paramiko",
    "nemo_aligner",
    "nemo_run",
    "invoke",
    "hydra-core",
    "multiprocess",
    "ijson",
    "docker",
    "antlr4-python3-runtime",
    "ruamel.yaml",
    "dill",
    "omegaconf",
    "webdataset",
    "text-unidecode",
    "pycparser",
    "fabric",
    "inquirerpy",
    "graphviz",
    "pynvml",
    "importlib_metadata",
    "rouge_score",
    "docstring_parser",
    "defusedxml",
    "catalogue",
    "wget",
    "typing-inspection",
    "pfzy",
    "pangu",
    "lazy-importer",
    "jsonlines",
    "deprecated",
    "decorator",
    "braceexpand",
    "annotated-types",
    "gguf",
]


def pins() -> dict[str, str]:
    """name: version, of constraints.txt, names as pip compares them."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, equals, rest = line.partition("==")
        if equals and ("python_version <" not in rest):
            found[plain(name)] = rest.split(";")[0].strip()
    return found


def plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def commands(directory: Path) -> list[list[str]]:
    """One `pip wheel` for each package."""
    versions = pins()
    return [
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "-w",
            str(directory / "wheels"),
            requirement,
        ]
        for requirement in (f"{name}=={versions[plain(name)]}" for name in NAMES)
    ]


def pieces(sizes: dict[Path, int], limit: int) -> list[list[Path]]:
    """The files, largest first, each into the first piece that has room; a larger file is a piece of its own."""
    made: list[list[Path]] = []
    for file in sorted(sizes, key=lambda each: -sizes[each]):
        for piece in made:
            if sum(sizes[each] for each in piece) + sizes[file] <= limit:
                piece.append(file)
                break
        else:
            made.append([file])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=int, default=44, help="the most that one transfer takes, MiB")
    a = parser.parse_args()
    for command in commands(a.directory):
        subprocess.run(command, check=True)
    wheels = {file: file.stat().st_size for file in (a.directory / "wheels").glob("*.whl")}
    for number, piece in enumerate(pieces(wheels, a.megabytes * 2**20)):
        with tarfile.open(a.directory / f"piece{number}.tar", "w") as tar:
            for file in piece:
                tar.add(file, f"wheels/{file.name}")
        print(a.directory / f"piece{number}.tar")


if __name__ == "__main__":
    main()
