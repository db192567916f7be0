"""The stand-ins for hosts without CUDA: each closes the gap that it names, and nothing is touched where CUDA is."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.cpu_compat.norm import HostNorm

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "nemo_minitron" / "cpu_compat"
without_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stand-ins are for hosts without CUDA"
)


def gaps() -> list[str]:
    """What the `close_gaps` of each file of cpu_compat/ calls, itself or through others that close gaps."""
    found = []
    for path in sorted(HOSTS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("close_"):
                called = [
                    ast.unparse(line.value.func)
                    for line in ast.walk(node)
                    if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)
                ]
                found += [f"{path.stem}.{name}" for name in called if not name.startswith("close_")]
    return list(dict.fromkeys(found))


def run(code: str) -> Any:
    """What a process of its own prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return run("from tests.support import host_gaps; host_gaps.main()")


@without_cuda
@pytest.mark.parametrize("gap", gaps())
def test_a_stand_in_closes_the_gap_that_it_names(answers: dict[str, Any], gap: str) -> None:
    assert gap in answers["gaps"], "tests/unit/host_gaps*.py do not show what it is for"
    assert answers["gaps"][gap] is None, answers["gaps"][gap]


@without_cuda
def test_no_proof_is_left_over(answers: dict[str, Any]) -> None:
    assert list(answers["gaps"]) == sorted(gaps(), key=list(answers["gaps"]).index)
    assert {gap.split(".")[0] for gap in gaps()} == {
        "cuda_names",
        "megatron",
        "nemo2",
        "aligner",
        "local_spec",
    }


@without_cuda
def test_one_line_is_logged(answers: dict[str, Any]) -> None:
    (line,) = answers["lines"]
    assert "CPU" in line
    assert "gloo" in line
    assert answers["returned"] == [True] * 4


WITH_CUDA = """
import json, logging, os, sys, types, warnings
import torch
torch.cuda.is_available = lambda: True
if {engine}:
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = types.ModuleType(name)
before_env, filters = dict(os.environ), list(warnings.filters)
places = [torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Module]
before = [dict(vars(place)) for place in places]
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("nemo_minitron").addHandler(handler)
logging.getLogger("nemo_minitron").setLevel(logging.INFO)
modules = set(sys.modules)
from nemo_minitron import cpu_compat
returned = [cpu_compat.prepare_megatron()]
returned += [cpu_compat.prepare_nemo(), cpu_compat.prepare_aligner()] if {engine} else []
imported = set(sys.modules) - modules
changed = [
    f"{{place.__name__}}.{{name}}"
    for place, then in zip(places, before)
    for name in {{**then, **vars(place)}}
    if not name.startswith("_") and then.get(name, vars(place).get(name)) is not vars(place).get(name)
]
layer = None
if not {engine}:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    spec = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    layer = [spec.input_layernorm.__name__, spec.self_attention.submodules.core_attention.__name__]
print(json.dumps({{
    "returned": returned, "changed": changed, "lines": lines, "imported": sorted(imported), "layer": layer,
    "environment": dict(os.environ) == before_env, "filters": warnings.filters == filters,
}}))
"""


def test_nothing_is_touched_where_there_is_cuda_and_transformer_engine() -> None:
    """No name, no environment variable, no warning; neither Megatron nor a file with stand-ins is imported."""
    seen = run(WITH_CUDA.format(engine=True))
    assert seen["returned"] == [False] * 3
    assert seen["changed"] == []
    assert len(seen["lines"]) == 1
    assert "with Transformer Engine" in seen["lines"][0]
    assert seen["environment"]
    assert seen["filters"]
    assert [name for name in seen["imported"] if not name.startswith("nemo_minitron")] == []
    assert {name for name in seen["imported"] if "cpu_compat" in name} == {
        f"nemo_minitron.cpu_compat{file}"
        for file in (
            *("", ".imports", ".after_import", ".local_spec", ".presence", ".product_choice"),
            ".write_results",  # what `after_import` puts in, with CUDA too
        )
    }


def test_cuda_without_transformer_engine_has_the_local_layers_and_its_own_names() -> None:
    seen = run(WITH_CUDA.format(engine=False))
    assert seen["returned"] == [False]
    assert seen["changed"] == []
    assert seen["environment"]
    assert len(seen["lines"]) == 1
    assert "without Transformer Engine" in seen["lines"][0]
    assert seen["layer"] == ["HostNorm", "HostAttention"]
    assert not {f"nemo_minitron.cpu_compat.{file}" for file in ("cuda_names", "megatron")} & set(
        seen["imported"]
    )


WITHOUT_APEX = """
import json, os
import torch
torch.cuda.is_available = lambda: True
from nemo_minitron import cpu_compat
returned = [cpu_compat.prepare_nemo(), cpu_compat.prepare_aligner()]
from nemo.collections.nlp.modules.common.megatron import clip_grads
from nemo.collections.nlp.parts import nlp_overrides
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS
from nemo_aligner.utils import distributed
print(json.dumps({
    "returned": returned, "strategy": nlp_overrides.HAVE_APEX, "clips": hasattr(clip_grads, "amp_C"),
    "version": os.environ["NVIDIA_PYTORCH_VERSION"], "optimizer": "sharded_adamw" in AVAILABLE_OPTIMIZERS,
    "torch": [clip_grads.torch is torch, distributed.torch is torch],
}))
"""


def test_cuda_without_apex_lets_alignment_run_on_its_own_names() -> None:
    """Seen on one GPU; here CUDA is said to be there. Only what Apex and a container would bring is put in."""
    seen = run(WITHOUT_APEX)
    assert seen == {
        "returned": [False, False],
        "strategy": True,
        "clips": True,
        "optimizer": True,
        "version": "25.02",
        "torch": [True, True],
    }


# ---- the norm ------------------------------------------------------------------------------------------------


def config(
    normalization: str, zero_centered: bool, sequence_parallel: bool = False, dtype: Any = torch.float32
) -> Any:
    return SimpleNamespace(
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
    )


def expected(x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """By definition, in float64: RMSNorm without beta, LayerNorm with it. x [..., h]."""
    if beta is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gamma
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gamma + beta


KINDS = [("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", False), ("LayerNorm", True)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize(("normalization", "zero_centered"), KINDS, ids=["rms", "rms1p", "layer", "layer1p"])
def test_the_norm_is_what_its_definition_says(
    normalization: str, zero_centered: bool, eps: float, sequence_parallel: bool
) -> None:
    """Value and all gradients. LayerNorm1P stores gamma - 1."""
    generator = torch.Generator().manual_seed(1)
    norm = HostNorm(config(normalization, zero_centered, sequence_parallel), 6, eps=eps)
    stored = torch.randn(6, generator=generator)
    norm.weight.data.copy_(stored)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"][
        : 1 + (normalization == "LayerNorm")
    ]
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())
    if norm.bias is not None:
        norm.bias.data.copy_(torch.randn(6, generator=generator))
    x = 3 + torch.randn(4, 2, 6, generator=generator)
    upstream = torch.randn(4, 2, 6, generator=generator)

    ours = [x.clone().requires_grad_(), *norm.parameters()]
    output = norm(ours[0])
    output.backward(upstream)
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    gamma = theirs[1] + 1 if zero_centered else theirs[1]
    reference = expected(theirs[0], gamma, theirs[2] if len(theirs) > 2 else None, eps)
    reference.backward(upstream.double())

    assert output.dtype is torch.float32
    torch.testing.assert_close(output.double(), reference, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("of_x", "of_gamma"), [(True, False), (False, True)])
def test_a_frozen_norm_or_input_has_no_gradient(of_x: bool, of_gamma: bool) -> None:
    norm = HostNorm(config("RMSNorm", False), 6)
    x, upstream = (torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    ours = [x.requires_grad_(of_x), norm.weight.requires_grad_(of_gamma)]
    norm(x).backward(upstream)
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    expected(*theirs, None, 1e-5).backward(upstream.double())
    for mine, other, wanted in zip(ours, theirs, (of_x, of_gamma), strict=True):
        assert (mine.grad is not None) is wanted
        if wanted:
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_the_norm_keeps_its_input_alone() -> None:
    norm, kept = HostNorm(config("RMSNorm", False), 64), []
    x = torch.randn(8, 2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()}
    assert large == {x.data_ptr()}


@pytest.mark.parametrize(("normalization", "zero_centered"), KINDS)
def test_a_fresh_norm_scales_by_one(normalization: str, zero_centered: bool) -> None:
    norm = HostNorm(config(normalization, zero_centered, dtype=torch.bfloat16), 8)
    x = torch.linspace(-2, 3, 16).view(2, 8)
    beta = torch.zeros(8).double() if normalization == "LayerNorm" else None
    reference = expected(x.bfloat16().double(), torch.ones(8).double(), beta, 1e-5)
    output = norm(x.bfloat16())
    assert output.dtype is norm.weight.dtype is torch.bfloat16
    torch.testing.assert_close(output.double(), reference, rtol=1e-2, atol=1e-2)


def test_another_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="L2Norm.*LayerNorm and RMSNorm"):
        HostNorm(config("L2Norm", False), 8)
