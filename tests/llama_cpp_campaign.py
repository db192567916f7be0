"""llama.cpp's own quantiser, which only llama-cpp-python has, in an environment of its own beside this one:

    python -m tests.llama_cpp_campaign --home DIR    # from the repository's root

The environment lies in the cache and is made once; pip compiles the package (about 400 s of a processor). Where that
fails one line says so, and nothing is tried.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llama-cpp-python==0.3.36"
# For any x86 processor of the last ten years, whatever this one is.
_CMAKE = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"
_BUILD_S = 3600
TEACHER = ROOT / "assets" / "demo-teacher"
# Of the root mean square: what a block of so many bits loses, and a half more.
_LOST = {"Q4_K_M": 0.12, "Q6_K": 0.03}
# llama.cpp's answer, greedily, by the binding itself.
_GREEDY = """
import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
ids = model.tokenize(sys.argv[2].encode(), add_bos=False)
made = model.generate(ids, temp=0.0)
print(ids, [next(made) for _ in range(12)])
"""
_PROMPT = "def main(arguments):\n    return "


def environment(cache: Path) -> Path | None:
    """The interpreter that has the package and everything of this one's, or None."""
    place = cache / PACKAGE.replace("==", "-")
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        (site,) = place.glob("lib/python*/site-packages")
        (site / "zz_beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0:
        return python
    building = {**os.environ, "CMAKE_ARGS": _CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    command = [python, "-m", "pip", "install", "-q", "--no-deps", PACKAGE, "diskcache"]
    done = subprocess.run(command, env=building, capture_output=True, text=True, timeout=_BUILD_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"llama.cpp's quantiser was not run: pip install {PACKAGE} fails: {last}", flush=True)
        return None
    return python


def exported(python: Path, home: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The demo teacher's file of a type, and result.json."""
    to = home / kind
    settings = ["license=none", "export.verify_tokens=64", "export.perplexity_tokens=128"]
    places = [f"source={TEACHER}", f"to={to}", f"run_dir={home / 'runs' / kind}"]
    done = subprocess.run(
        [
            python,
            ROOT / "recipes" / "export.py",
            "format=gguf",
            f"export.quantization={kind}",
            *settings,
            *places,
        ],
        env={**os.environ, "NEMO_MINITRON_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return to / f"model-{kind}.gguf", json.loads(Path(done.stdout.splitlines()[-1]).read_text())


def _values(file: Path) -> dict[str, tuple[str, Any]]:
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in tensors}


def check_quantised(kind: str, file: Path, result: dict[str, Any], plain: dict[str, tuple[str, Any]]) -> str:
    """Types, values and perplexity beside the float32 file's; a line of figures."""
    found, blocks, lost = _values(file), set(), 0.0
    assert found.keys() == plain.keys()
    uneven = [name for name, (_, value) in plain.items() if value.ndim == 2 and value.shape[1] % 256]
    assert result["rows_that_fit_no_block"] == len(uneven), (result["rows_that_fit_no_block"], len(uneven))
    for name, (theirs, value) in found.items():
        expected = plain[name][1]
        if value.ndim == 2 and name not in uneven:
            blocks.add(theirs)
            assert theirs.endswith("_K"), (name, theirs)
        error = math.sqrt(np.mean((value - expected) ** 2) / np.mean(expected**2))
        lost = max(lost, error)
    assert blocks, "no matrix fits the blocks"
    assert 0 < lost < _LOST[kind], lost
    worse = math.log(result["perplexity"] / result["perplexity_f16"])
    assert abs(worse) < 0.1, worse
    types = {theirs for theirs, value in found.values() if value.ndim == 2}
    return (
        f"{kind}: {sorted(types)}, {len(uneven)} matrices fit no block, at most {lost:.3f} of a matrix lost, "
        f"perplexity {result['perplexity']:.2f}, of F16 {result['perplexity_f16']:.2f}"
    )


def check_greedy(python: Path, file: Path) -> None:
    """The binding's tokens and greedy answer beside transformers'."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(TEACHER).encode(_PROMPT)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, torch_dtype=torch.float32)
    with torch.no_grad():
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    done = subprocess.run([python, "-c", _GREEDY, file, _PROMPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.strip().splitlines()[-1] == f"{ids} {whole[0, len(ids) :].tolist()}", done.stdout


def main() -> int:
    """1 if anything is wrong; 0 too where the package cannot be had, which is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="a directory of the campaign's own")
    home = parser.parse_args().home.resolve()
    kept = os.environ.get("NEMO_MINITRON_HOME")
    cache = (
        Path(kept)
        if kept
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nemo_minitron"
    )
    python = environment(cache / "envs")
    if python is None:
        return 0
    file, _ = exported(python, home, "F32")
    check_greedy(python, file)
    plain = _values(file)
    for kind in _LOST:
        print(check_quantised(kind, *exported(python, home, kind), plain), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
