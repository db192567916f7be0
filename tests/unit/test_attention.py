"""Core attention by torch beside megatron-core's own module and beside its definition in float64."""

import copy
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import process_groups

pytestmark = pytest.mark.usefixtures("megatron")

# Query heads, groups, head size: the demo teacher's, SmolLM2-135M's, Llama 3's (fewer), Gemma's, multi-head attention.
SHAPES = [(6, 2, 24), (9, 3, 64), (8, 2, 128), (4, 1, 256), (3, 3, 16)]


def both(
    heads: int,
    groups: int,
    size: int,
    *,
    tp: int = 1,
    window: Any = None,
    dropout: float = 0.0,
    scaling: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """Ours and Megatron's."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_minitron.cpu_compat.attention import HostAttention

    config = TransformerConfig(
        num_layers=4,
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=size,
        attention_dropout=dropout,
        apply_query_key_layer_scaling=scaling,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bf16=dtype is torch.bfloat16,
    )
    config.num_query_groups = groups
    ranks = process_groups.of_tensor_ranks(DotProductAttention, tp)
    made = []
    for kind in (HostAttention, DotProductAttention):
        config.window_size = window if kind is HostAttention else None
        made.append(kind(config, 3, AttnMaskType.causal, "self", softmax_scale=scale, **ranks).train())
        if window:
            config = copy.copy(config)
    return made[0], made[1]


def inputs(heads: int, groups: int, size: int, sq: int, sk: int | None = None, b: int = 2) -> list[Tensor]:
    """Query [sq, b, heads, size], key and value [sk, b, groups, size]."""
    generator = torch.Generator().manual_seed(heads * 1000 + sq)
    shapes = [(sq, b, heads, size)] + [(sk or sq, b, groups, size)] * 2
    return [torch.randn(shape, generator=generator) for shape in shapes]


def defined(tensors: list[Tensor], forbidden: Tensor, scale: float) -> Tensor:
    """softmax(q k / scale) v in float64. forbidden: bool, broadcast to [b, heads, sq, sk]."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in tensors)
    k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(forbidden, -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def causal(sq: int, sk: int, left: int | None = None) -> Tensor:
    rows, keys = torch.arange(sq).unsqueeze(1) + sk - sq, torch.arange(sk)
    return (keys > rows) if left is None else (keys > rows) | (keys < rows - left)


def results(attend: Any, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = attend(*leaves)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def agree(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "groups", "size"), SHAPES)
@pytest.mark.parametrize("length", [1, 7, 300])
def test_it_is_megatrons(heads: int, groups: int, size: int, length: int) -> None:
    ours, theirs = both(heads, groups, size)
    tensors = inputs(heads, groups, size, length)
    upstream = torch.randn(length, 2, heads * size, generator=torch.Generator().manual_seed(1))
    agree(
        results(lambda *t: ours(*t, None), tensors, upstream),
        results(lambda *t: theirs(*t, None), tensors, upstream),
    )


@pytest.mark.parametrize(("heads", "groups", "size"), SHAPES[:2])
def test_bf16_is_as_near_to_its_definition_as_megatrons(heads: int, groups: int, size: int) -> None:
    ours, theirs = both(heads, groups, size, dtype=torch.bfloat16)
    tensors = [tensor.bfloat16() for tensor in inputs(heads, groups, size, 64)]
    upstream = torch.randn(64, 2, heads * size, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = results(
        lambda *t: defined(list(t), causal(64, 64), size**-0.5), [t.double() for t in tensors], upstream
    )

    def error(module: Any) -> float:
        found = results(lambda *t: module(*t, None), tensors, upstream)
        assert found[0].dtype is torch.bfloat16
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    assert error(ours) < 1.5 * error(theirs) < 0.05


def test_two_tensor_parallel_ranks_have_half_the_heads() -> None:
    ours, theirs = both(8, 4, 16, tp=2)
    tensors = inputs(4, 2, 16, 20)
    upstream = torch.randn(20, 2, 64)
    agree(
        results(lambda *t: ours(*t, None), tensors, upstream),
        results(lambda *t: theirs(*t, None), tensors, upstream),
    )


@pytest.mark.parametrize(("scaling", "scale"), [(True, None), (False, 0.3), (True, 0.3)])
def test_the_softmax_scale(scaling: bool, scale: float | None) -> None:
    ours, theirs = both(4, 2, 16, scaling=scaling, scale=scale)
    tensors = inputs(4, 2, 16, 20)
    expected = defined([t.double() for t in tensors], causal(20, 20), scale or 0.25)
    agree([ours(*tensors, None)] * 2, [expected, theirs(*tensors, None)])


@pytest.mark.parametrize("length", [40, 600])
@pytest.mark.parametrize("left", [1, 300, 10_000])
def test_a_window(left: int, length: int) -> None:
    ours, _ = both(4, 2, 16, window=(left, 0))
    tensors = inputs(4, 2, 16, length)
    upstream = torch.randn(length, 2, 64)
    agree(
        results(lambda *t: ours(*t, None), tensors, upstream),
        results(
            lambda *t: defined(list(t), causal(length, length, left), 0.25),
            [t.double() for t in tensors],
            upstream,
        ),
    )


@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (5, 9), (300, 700)])
@pytest.mark.parametrize("given", [False, True])
def test_queries_after_cached_keys(sq: int, sk: int, given: bool) -> None:
    """Megatron wants a mask there, as its inference gives one."""
    ours, theirs = both(4, 2, 16)
    tensors = inputs(4, 2, 16, sq, sk)
    mask = causal(sq, sk).view(1, 1, sq, sk)
    agree([ours(*tensors, mask if given else None)], [theirs(*tensors, mask)])


@pytest.mark.parametrize("one", [False, True])
def test_document_limits(one: bool) -> None:
    """A mask [b or 1, 1, s, s] whose documents end at other places in each sequence."""
    ours, theirs = both(6, 2, 8)
    length, ends = 300, torch.tensor([[100, 290], [3, 257]][: 1 if one else 2])
    document = (torch.arange(length).unsqueeze(-1) >= ends.unsqueeze(1)).sum(-1)
    mask = (causal(length, length) | (document.unsqueeze(2) != document.unsqueeze(1))).unsqueeze(1)
    tensors, upstream = inputs(6, 2, 8, length), torch.randn(length, 2, 48)
    agree(
        results(lambda *t: ours(*t, mask), tensors, upstream),
        results(lambda *t: theirs(*t, mask), tensors, upstream),
    )


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from nemo_minitron.cpu_compat import attention

    attention._say_once.cache_clear()
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(attention.logger, "handlers", [handler])
    before = attention.logger.level
    attention.logger.setLevel(logging.INFO)
    yield found
    attention.logger.setLevel(before)


def test_left_padding_is_megatrons_and_one_line_says_so(lines: list[str]) -> None:
    ours, theirs = both(4, 2, 16)
    mask = causal(12, 12).repeat(2, 1, 1, 1)
    mask[1, ..., :5] = True
    tensors = inputs(4, 2, 16, 12)
    for _ in range(2):
        torch.testing.assert_close(ours(*tensors, mask), theirs(*tensors, mask), rtol=0, atol=0)
    (line,) = lines
    assert "see no key" in line


def test_dropout_is_megatrons_while_training(lines: list[str]) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ours, theirs = both(4, 2, 16, dropout=0.5)
    tensors = inputs(4, 2, 16, 12)
    found = []
    for module in (ours, theirs):
        model_parallel_cuda_manual_seed(5)
        found.append(module(*tensors, None))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(lines) == 1
    agree([ours.eval()(*tensors, None)], [theirs.eval()(*tensors, None)])
    assert len(lines) == 1


def test_the_mask_that_stands_for_none_is_none_for_megatron_too(lines: list[str]) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_minitron.cpu_compat import attention

    ours, theirs = both(4, 2, 16, dropout=0.5)
    tensors, nothing = inputs(4, 2, 16, 12), attention.no_mask(torch.device("cpu"))
    model_parallel_cuda_manual_seed(5)
    found = ours(*tensors, nothing)
    model_parallel_cuda_manual_seed(5)
    torch.testing.assert_close(found, theirs(*tensors, None), rtol=0, atol=0)
    agree([ours.eval()(*tensors, nothing)], [theirs.eval()(*tensors, None)])


def test_memory_is_linear_in_the_sequence() -> None:
    """Bytes that forward and backward allocate at once, by torch's own profiler; Megatron's are quadratic."""

    def peak(module: Any, length: int) -> int:
        tensors = [t.requires_grad_() for t in inputs(4, 2, 16, length, b=1)]
        with torch.profiler.profile(profile_memory=True) as profile:
            module(*tensors, None).sum().backward()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    ours, theirs = both(4, 2, 16)
    assert peak(ours, 2048) < 2.5 * peak(ours, 1024)
    assert peak(ours, 2048) < peak(theirs, 2048) / 10
    windowed, _ = both(4, 2, 16, window=(100, 0))
    assert peak(windowed, 2048) < 2.5 * peak(windowed, 1024)


def test_the_local_spec_has_it() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from nemo_minitron.cpu_compat.attention import HostAttention

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    assert spec.submodules.self_attention.submodules.core_attention is HostAttention
