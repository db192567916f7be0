"""Matrix products on CPUs by another library: their values beside float64, what stays with torch, and who chooses."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_minitron.cpu_compat import product_choice, products
from nemo_minitron.cpu_compat.product_choice import Choice
from nemo_minitron.errors import InputError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="products stay as they are where CUDA is")
OURS = Choice("onednn", "float32", decided_by="test")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
LAYOUTS = ("rows", "transposed", "every other column", "part of rows", "expanded")


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Ours for products of every size; gives the sizes (m, n, k) of those that were ours."""
    monkeypatch.setattr(products, "_FEWEST", dict.fromkeys(TOLERANCE, 1))
    monkeypatch.setattr(products, "_NARROWEST", 1)
    monkeypatch.setattr(products, "_WIDENED", 64)
    made: list[tuple[int, ...]] = []
    make = products._product

    def product(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        made.append((a.size(0), b.size(1), a.size(1)))
        return make(a, b, *rest)

    monkeypatch.setattr(products, "_product", product)
    assert products.use(OURS)
    yield made
    products.use(Choice())


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if layout == "transposed":
        return normal(columns, rows).t()
    if layout == "every other column":
        return normal(rows, 2 * columns)[:, ::2]
    if layout == "part of rows":
        return normal(rows, columns + 3)[:, 1 : columns + 1]
    if layout == "expanded":
        return normal(rows, 1).expand(rows, columns)
    return normal(rows, columns)


def close(ours: Tensor, reference: Tensor, dtype: torch.dtype, k: int) -> None:
    """reference: float64. Elements are sums of k products of normal numbers, some of which cancel."""
    assert ours.dtype is dtype
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(ours.double(), reference, rtol=bound, atol=bound * max(1, k) ** 0.5)


sizes = st.integers(0, 40)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(sizes, st.one_of(sizes, st.just(600)), sizes),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    dtype=st.sampled_from(list(TOLERANCE)),
    beta=st.sampled_from([0, 1, 0.5, -2]),
    alpha=st.sampled_from([1, 0, 0.25]),
    added=st.sampled_from(["[m, n]", "[n]", "[m, 1]", "[]"]),
)
def test_every_form_is_the_product_in_float64(
    replaced: list[Any], shape: Any, layouts: Any, dtype: torch.dtype, beta: Any, alpha: Any, added: str
) -> None:
    m, n, k = shape
    a, b = matrix(m, k, layouts[0], dtype, 1), matrix(k, n, layouts[1], dtype, 2)
    bias = matrix(m, n, "rows", dtype, 3)
    if added != "[m, n]":
        bias = {"[n]": bias[:1].flatten(), "[m, 1]": bias[:, :1], "[]": bias.new_tensor(0.5)}[added]
        if bias.numel() == 0:
            bias = torch.ones((), dtype=dtype)
    product = a.double() @ b.double()
    combined = beta * bias.double() + alpha * product

    close(torch.mm(a, b), product, dtype, k)
    close(torch.mm(a, b, out=torch.empty(n, m, dtype=dtype).t()), product, dtype, k)
    close(torch.addmm(bias, a, b, beta=beta, alpha=alpha), combined, dtype, k)
    out = torch.empty(m, n, dtype=dtype)
    close(torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=out), combined, dtype, k)
    total = bias.expand(m, n).clone()
    close(total.addmm_(a, b, beta=beta, alpha=alpha), combined, dtype, k)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["rows", "transposed", "part of rows"])
def test_dense_products_are_ours_and_no_others(replaced: list[Any], dtype: torch.dtype, layout: str) -> None:
    a, b = matrix(24, 32, layout, dtype, 1), matrix(32, 40, layout, dtype, 2)
    torch.mm(a, b)
    assert replaced[0] == (24, 40, 32)
    count = len(replaced)
    for odd in ("every other column", "expanded"):
        torch.mm(matrix(24, 32, odd, dtype, 1), b)
    torch.mm(a.double(), b.double())
    torch.mm(a.to(torch.float16), b.to(torch.float16))
    torch.bmm(a.unsqueeze(0), b.unsqueeze(0))
    torch.mm(a.long(), b.long())
    assert len(replaced) == count


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_are_those_in_float64(replaced: list[Any], dtype: torch.dtype) -> None:
    """Of a linear layer with bias on [s, b, h] and of a matmul, as Megatron and transformers have them."""
    generator = torch.Generator().manual_seed(5)
    x, w, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((6, 4, 32), (48, 32), (48,)))
    upstream = torch.randn(6, 4, 48, generator=generator).to(dtype)
    for with_bias in (True, False):
        ours = [tensor.clone().requires_grad_() for tensor in (x, w, bias)]
        theirs = [tensor.double().requires_grad_() for tensor in (x, w, bias)]
        for leaves, gradient in ((ours, upstream), (theirs, upstream.double())):
            last = leaves[2] if with_bias else None
            torch.nn.functional.linear(leaves[0], leaves[1], last).backward(gradient)
        for mine, other in zip(ours[: 2 + with_bias], theirs, strict=False):
            close(mine.grad, other.grad, dtype, 48)
    assert {(24, 48, 32), (24, 32, 48)} <= set(replaced)
    assert {(48, 32, 24), (32, 48, 24)} & set(replaced)


def test_a_value_that_is_no_number_is_not_hidden(replaced: list[Any]) -> None:
    for dtype in TOLERANCE:
        a, b = torch.ones(32, 32, dtype=dtype), torch.ones(32, 32, dtype=dtype)
        a[3, 5], a[7, 1] = torch.nan, torch.inf
        product = torch.mm(a, b)
        assert product[3].isnan().all()
        assert product[7].isposinf().all()
        assert product.isfinite().sum() == 30 * 32
        unread = torch.full((32, 32), torch.nan, dtype=dtype)
        assert torch.addmm(unread, b, b, beta=0).isfinite().all()
    assert len(replaced) == 6  # those of bfloat16 are made of products of float32


def test_what_torch_refuses_is_refused_in_its_words(replaced: list[Any]) -> None:
    a = torch.ones(20, 30)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.mm(a, a)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(a, torch.ones(30, 4, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="must be a matrix|2D"):
        torch.mm(a, torch.ones(30))
    with pytest.raises(RuntimeError, match="must match|expand"):
        torch.addmm(torch.ones(7), a, torch.ones(30, 20))
    assert replaced == []


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        products, "_product", lambda a, b, *rest: made.append(1) or a.new_zeros(len(a), b.size(1))
    )
    try:
        products.use(OURS)
        for dtype in TOLERANCE:
            torch.mm(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
            torch.mm(torch.ones(4, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype))
        assert made == []
        torch.mm(torch.ones(256, 256), torch.ones(256, 256))
        assert made == [1]
    finally:
        products.use(Choice())


def test_steps_of_training_are_the_same(replaced: list[Any]) -> None:
    """A transformer layer and its output layer, forward, backward and Adam, by torch's products and by oneDNN's."""
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Embedding(128, 64), layer, torch.nn.Linear(64, 128))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    text, ended = torch.randint(128, (2, 33)), []
    for choice in (OURS, Choice()):
        products.use(choice)
        count = len(replaced)
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(text[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        assert (len(replaced) >= count + 3 * 3 * 5) is (choice is OURS)
        ended.append((loss.item(), {name: value.clone() for name, value in model.state_dict().items()}))
    assert ended[0][0] == pytest.approx(ended[1][0], rel=1e-6)
    for name, value in ended[0][1].items():
        torch.testing.assert_close(value, ended[1][1][name], rtol=1e-3, atol=2e-5)


def test_choosing_torch_replaces_nothing() -> None:
    before = torch._C._dispatch_dump("aten::mm")
    assert not products.use(Choice())
    assert torch._C._dispatch_dump("aten::mm") == before
    assert products.use(OURS)
    assert torch._C._dispatch_dump("aten::mm") != before
    products.use(Choice())
    assert torch._C._dispatch_dump("aten::mm") == before


def test_nothing_is_replaced_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.cpu_compat import presence

    monkeypatch.setattr(presence, "cuda_was_present", lambda: True)
    before = torch._C._dispatch_dump("aten::mm")
    assert not products.use(OURS)
    assert torch._C._dispatch_dump("aten::mm") == before


# ---- who chooses ------------------------------------------------------------------------------------------------

EPYC = ("AuthenticAMD", "AMD EPYC 7763", {"avx2"})
GENOA = ("AuthenticAMD", "AMD EPYC 9654", {"avx512f", "avx512_bf16"})
XEON = ("GenuineIntel", "Intel Xeon", {"avx512f"})
SAPPHIRE = ("GenuineIntel", "Intel Xeon 8480", {"avx512f", "avx512_bf16", "amx_bf16"})
ARM = ("", "unknown", set[str]())


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the processor and the variable."""
    monkeypatch.setattr(product_choice, "_current", None)

    def set_both(processor: Any, asked: str | None = None) -> None:
        monkeypatch.setattr(product_choice, "processor", lambda: processor)
        monkeypatch.delenv(product_choice.SWITCH, raising=False)
        if asked is not None:
            monkeypatch.setenv(product_choice.SWITCH, asked)

    return set_both


@pytest.mark.parametrize(
    ("processor", "asked", "float32", "bfloat16"),
    [
        (EPYC, None, "onednn", "float32"),
        (GENOA, "auto", "onednn", "torch"),
        (XEON, None, "torch", "float32"),
        (SAPPHIRE, "", "torch", "torch"),
        (ARM, None, "torch", "torch"),
        (ARM, "onednn", "torch", "torch"),
        (XEON, "onednn", "onednn", "float32"),
        (EPYC, "mkl", "torch", "torch"),
    ],
)
def test_the_processor_chooses_unless_the_variable_does(
    on: Any, processor: Any, asked: str | None, float32: str, bfloat16: str
) -> None:
    on(processor, asked)
    choice = product_choice.choose()
    assert (choice.float32, choice.bfloat16, choice.processor) == (float32, bfloat16, processor[1])


def test_this_processor_is_read() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    vendor, name, flags = product_choice.processor()
    assert f"vendor_id\t: {vendor}" in lines or not vendor
    assert any(line.endswith(name) for line in lines) or name == "unknown"
    assert not flags or "fpu" in flags


def test_another_value_is_refused(on: Any) -> None:
    on(XEON, "blas")
    with pytest.raises(InputError, match=r"NEMO_MINITRON_PRODUCTS=blas: auto, onednn and mkl are legal"):
        product_choice.choose()


def test_a_run_goes_on_with_what_it_began_with(on: Any, tmp_path: Path) -> None:
    """On another processor too, and so do ranks that sit on one, unless the variable says otherwise."""
    on(EPYC)
    first = product_choice.settle(tmp_path, write=True)
    assert json.loads((tmp_path / "cpu_products.json").read_text()) == dataclasses.asdict(first)
    assert first.float32 == "onednn"
    on(XEON)
    assert product_choice.settle(tmp_path, write=True) == first == product_choice.current()
    assert product_choice.settle(tmp_path, write=False) == first
    on(XEON, "mkl")
    assert product_choice.settle(tmp_path, write=True).float32 == "torch"
    on(EPYC)
    assert product_choice.settle(tmp_path, write=False).float32 == "torch"


@pytest.mark.parametrize("text", ["{", "[]", '{"float32": "cublas"}', '{"library": "onednn"}'])
def test_a_damaged_record_is_refused(on: Any, tmp_path: Path, text: str) -> None:
    on(EPYC)
    (tmp_path / "cpu_products.json").write_text(text)
    with pytest.raises(InputError, match=r"cpu_products\.json: not a record of products"):
        product_choice.settle(tmp_path, write=True)
