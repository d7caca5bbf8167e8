"""bias_gelu: against float64, with PyTorch's own error in the same dtype as the measure."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from python_tests.oracle import assert_as_accurate_as_torch
from stackbert_kernels import ops
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES
from stackbert_kernels.ops.gelu import op

ISAS = ["generic", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16]
FORMS = ["none", "tanh"]


class Case(NamedTuple):
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    bias: torch.dtype = torch.float32
    spread: float = 1.0


CASES = [
    Case(1, 1),
    Case(3, 7),  # less than a vector
    Case(5, 769),  # a tail behind whole vectors
    Case(300, 40),  # several chunks of rows
    Case(8, 768, spread=10.0),  # both tails
    Case(5, 769, dtype=torch.bfloat16),
    Case(300, 40, dtype=torch.bfloat16),
    Case(8, 768, dtype=torch.bfloat16, bias=torch.bfloat16, spread=10.0),
    Case(5, 769, dtype=torch.float16),
    Case(8, 768, dtype=torch.float16, bias=torch.float16, spread=10.0),
    Case(67, 1024),  # several turns of a Triton program, the last not full
]
case_ids = [f"{c.rows}x{c.columns}*{c.spread:g}-{str(c.dtype)[6:]}-{str(c.bias)[6:]}" for c in CASES]


def implementations(dtype):
    """Those that take it here. The interpreter of Triton cuts bfloat16 off instead of rounding it; float16 takes the same path on a GPU."""
    return {torch.bfloat16: ("native", "reference"), torch.float16: ("triton", "reference")}.get(
        dtype, ("native", "reference", "triton")
    )


def run(function, inputs, dy):
    """Output and the gradient of every input."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_matches_float64(case, approximate):
    x = (torch.randn(case.rows, case.columns) * case.spread).to(case.dtype)
    bias, dy = torch.randn(case.columns).to(case.bias), torch.randn(case.rows, case.columns).to(case.dtype)

    def torchs(x, bias):
        return F.gelu(x + bias.to(x.dtype), approximate=approximate)

    exact = run(torchs, [x.double(), bias.double()], dy)
    reference = run(lambda *a: ops.bias_gelu(*a, approximate=approximate), [x.double(), bias.double()], dy)
    torch.testing.assert_close(reference, exact)
    baseline = run(torchs, [x, bias], dy)
    for impl in implementations(case.dtype):
        ours = run(lambda *a, impl=impl: ops.bias_gelu(*a, approximate=approximate, impl=impl), [x, bias], dy)
        for name, a, want, b in zip(("y", "dx", "dbias"), ours, exact, baseline, strict=True):
            assert a.dtype == b.dtype
            assert_as_accurate_as_torch(f"{impl} {name}", a, want, b, 2.0 if name == "y" else 3.0)


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck_of_the_reference(approximate):
    x, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (5,)))
    torch.autograd.gradcheck(lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate), (x, bias))


def machine_runs(isa):
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this machine does not run {isa}")


def kernels(x, bias, dy, approximate, isa, guard=64):
    """y, dx, dbias from the kernels, written into poisoned buffers whose surroundings must stay poisoned."""
    poison = {
        n: torch.full((t.numel() + 2 * guard,), torch.nan, dtype=t.dtype)
        for n, t in (("y", x), ("dx", x), ("dbias", bias))
    }
    address = {n: b[guard:].data_ptr() for n, b in poison.items()}
    options = {"rows": x.shape[0], "columns": x.shape[1], "dtype": NATIVE_DTYPES[x.dtype], "threads": 2, "isa": isa}
    options["tanh"] = approximate == "tanh"
    space = torch.full((_C.bias_gelu_workspace(*x.shape) + guard,), torch.nan)
    inputs = {"x": x.data_ptr(), "bias": bias.data_ptr()}
    _C.bias_gelu_fwd(**inputs, y=address["y"], **options)
    _C.bias_gelu_bwd(
        dy=dy.data_ptr(), **inputs, dx=address["dx"], dbias=address["dbias"], workspace=space.data_ptr(), **options
    )
    assert space[-guard:].isnan().all()
    assert all(b[:guard].isnan().all() and b[-guard:].isnan().all() for b in poison.values())
    return [b[guard:-guard].view(t.shape) for b, t in zip(poison.values(), (x, x, bias), strict=True)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_kernels_stay_inside_their_outputs(approximate, dtype, isa):
    machine_runs(isa)
    for shape in ((1, 1), (3, 7), (5, 769), (130, 64)):
        x, dy, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
        exact = run(lambda x, b: F.gelu(x + b, approximate=approximate), [x.double(), bias.double()], dy)
        for name, got, want in zip(("y", "dx", "dbias"), kernels(x, bias, dy, approximate, isa), exact, strict=True):
            # half an ulp of the dtype for the final rounding, and what fp32 loses
            error, allowed = (got.double() - want).abs().max(), (torch.finfo(got.dtype).eps + 1e-6) * want.abs().max()
            assert error <= allowed, f"{shape} {name}: {error:.1e} > {allowed:.1e}"


@pytest.mark.parametrize("isa", ISAS)
def test_the_lower_tail_keeps_its_digits(isa):
    """1 + erf(u) has none left below u = -5; u * Phi(u) does, down to the smallest normal floats."""
    machine_runs(isa)
    x = torch.linspace(-12.9, 6.0, 100_000).view(1, -1)
    bias, dy = torch.zeros(x.shape[1]), torch.ones_like(x)
    u = x.double()
    cdf = 0.5 * torch.special.erfc(-u * 0.5**0.5)
    y, dx, _ = kernels(x, bias, dy, "none", isa)
    ulps = ((y.double() - u * cdf) / (u * cdf)).abs().nan_to_num() / 2**-24
    assert ulps.max() < 8  # half-ulps: 3 from 1 / (a + 3) through the polynomial, 3 from exp, 2 products
    assert ((dx.double() - run(F.gelu, [u], dy)[1]).abs() < 3e-7).all()


def by_triton(x, approximate):
    """y and the slope at x [C]."""
    x = x[None].requires_grad_()
    y = ops.bias_gelu(x, torch.zeros(x.shape[1]), approximate=approximate, impl="triton")
    return y.detach()[0], torch.autograd.grad(y, x, torch.ones_like(y))[0][0]


@pytest.mark.parametrize("approximate", FORMS)
def test_triton_keeps_the_digits_of_both_tails(approximate):
    x = torch.linspace(-12.9, 9.0, 8_000) if approximate == "none" else torch.linspace(-9.9, 9.0, 8_000)
    u = x.double().requires_grad_()
    cdf = torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))
    if approximate == "none":
        cdf = 0.5 * torch.special.erfc(-u * 0.5**0.5)
    want, (slope,) = (u * cdf).detach(), torch.autograd.grad(u * cdf, u, torch.ones_like(u))

    y, dx = by_triton(x, approximate)
    # exp2(-w) carries the rounding of w: w half-ulps of ln 2, and w is 122 for the last value
    assert ((y.double() - want) / want).abs().max() < 122 * 2**-24 * 1.5
    assert ((dx.double() - slope).abs() < 3e-7).all()

    # 16-bit: the short polynomial, 1e-5 of itself in what float16 can hold, must not show beside the rounding
    half = x.half()
    u = half.double().requires_grad_()
    cdf = torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))
    if approximate == "none":
        cdf = 0.5 * torch.special.erfc(-u * 0.5**0.5)
    want, (slope,) = (u * cdf).detach(), torch.autograd.grad(u * cdf, u, torch.ones_like(u))
    y, dx = by_triton(half, approximate)
    rounding = (2**-11 + 2e-5, 2**-25)  # half an ulp, of a normal and of a subnormal number
    torch.testing.assert_close(y.double(), want, rtol=rounding[0], atol=rounding[1])
    torch.testing.assert_close(dx.double(), slope, rtol=rounding[0], atol=rounding[1] + 2e-5)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("approximate", FORMS)
def test_triton_of_large_and_of_no_numbers(approximate):
    x = torch.tensor([50.0, 1e20, 3e38, -50.0, -1e20, -3e38, 0.0, torch.nan, torch.inf, -torch.inf])
    for values in (x, x.half()):
        y, dx = by_triton(values, approximate)
        large = values.isfinite()
        assert torch.equal(y[large], values.clamp(min=0)[large])
        step = torch.heaviside(values, torch.tensor(0.5).to(values))
        torch.testing.assert_close(dx[large], step[large], rtol=0, atol=1e-6)  # Phi(0)
        assert not y[~large].isfinite().any() and not dx[values.isnan()].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 769), (70, 128)])
def test_triton_stays_inside_its_outputs(shape, dtype, monkeypatch):
    guard, buffers = 64, []

    def guarded(like, **_):
        buffers.append(torch.full((like.numel() + 2 * guard,), torch.nan, dtype=like.dtype))
        return buffers[-1][guard:-guard].view(like.shape)

    x, dy, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
    monkeypatch.setattr(torch, "empty_like", guarded)
    op._bias_gelu_fwd(x, bias, "tanh", "triton")
    op._bias_gelu_bwd(dy, x, bias, "none", "triton")
    assert len(buffers) == 2
    for buffer in buffers:
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
        assert not buffer[guard:-guard].isnan().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("approximate", FORMS)
def test_special_values_propagate_as_in_torch(approximate, isa):
    machine_runs(isa)
    inf = float("inf")
    x = torch.tensor([[float("nan"), inf, -inf, 0.0, -0.0, 1e20, -1e20, 50.0, -50.0, 1e-30, -1e-30, 3e38, -3e38]])
    for dtype in DTYPES:
        values = x.to(dtype)
        y, dx, dbias = kernels(values, torch.zeros(x.shape[1]), torch.ones_like(values), approximate, isa)
        # torch's float32 is not all of a piece: gelu(inf) = nan and gelu(3e38) = inf by erf; its tanh slope overflows
        like = values.double() if approximate == "none" else values.float()
        want, want_dx = run(lambda u: F.gelu(u, approximate=approximate), [like], torch.ones_like(like))
        if approximate == "none":
            assert y[0, 1].isnan()
            want[0, 1] = torch.nan
        for ours, torchs in ((y, want), (dx, want_dx), (dbias[None], want_dx)):
            # atol: subnormals, which we flush; rtol: rounding to the dtype, and 3 ulp of Phi(0) by its polynomial
            rtol = torch.finfo(ours.dtype).eps + 3 * 2**-23
            torch.testing.assert_close(ours, torchs.to(ours.dtype), rtol=rtol, atol=1.2e-38, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_repetition(dtype):
    x, dy, bias = torch.randn(1000, 96).to(dtype), torch.randn(1000, 96), torch.randn(96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(run(ops.bias_gelu, [x, bias], dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_inputs_are_saved():
    x, bias, saved = torch.randn(16, 32, requires_grad=True), torch.randn(32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.bias_gelu(x, bias)
    assert saved == [x.data_ptr(), bias.data_ptr()]


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_no_rows(impl):
    y, dx, dbias = run(lambda *a: ops.bias_gelu(*a, impl=impl), [torch.empty(0, 8), torch.ones(8)], torch.empty(0, 8))
    assert y.shape == dx.shape == (0, 8) and torch.equal(dbias, torch.zeros(8))


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_strided_and_higher_rank_inputs(impl):
    x, bias, dy = torch.randn(4, 64, 6).transpose(1, 2), torch.randn(128)[::2], torch.randn(64, 6, 4).permute(2, 1, 0)

    def ours(x, bias):
        return ops.bias_gelu(x, bias, impl=impl)

    dense = run(ours, [t.contiguous() for t in (x, bias)], dy.contiguous())
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y = ours(x, bias)
    for a, b in zip(dense, [y, *torch.autograd.grad(y, (x, bias), dy)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_opcheck(impl):
    x, bias = torch.randn(5, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    torch.library.opcheck(op._bias_gelu_fwd, (x, bias, "none", impl))
    plain = torch.randn(5, 40), x.detach(), bias.detach()
    torch.library.opcheck(op._bias_gelu_bwd, (*plain, "tanh", impl), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks():
    def block(x, bias):
        return ops.bias_gelu(x * 2, bias, approximate="tanh")

    inputs, dy = [torch.randn(6, 32), torch.randn(32)], torch.randn(6, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(block, inputs, dy), run(compiled, inputs, dy), strict=True):
        assert torch.equal(a, b)


X, B = torch.ones(4, 8), torch.ones(8)
BAD = [
    (lambda: ops.bias_gelu(X, torch.ones(9)), ValueError, r"bias_gelu: bias must be \[8\] to match x, got \[9\]"),
    (lambda: ops.bias_gelu(X, B.double()), TypeError, "bias must be float32 or x's torch.float32, got torch.float64"),
    (lambda: ops.bias_gelu(X.int(), B), TypeError, "x must be floating point, got torch.int32"),
    (lambda: ops.bias_gelu(torch.tensor(1.0), B), ValueError, r"x must be \[rows, columns\], got \[\]"),
    (lambda: ops.bias_gelu(X, B, approximate="erf"), ValueError, "approximate must be one of none, tanh, got 'erf'"),
    (
        lambda: ops.bias_gelu(X.double(), B.double(), impl="triton"),
        ValueError,
        "triton takes float32, bfloat16 and float16, got float64; usable: reference",
    ),
    (lambda: ops.bias_gelu(X.half(), B, impl="native"), ValueError, "native takes float32 and bfloat16, got float16"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
