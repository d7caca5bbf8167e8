"""The CUDA bias_gelu on the host: against float64, under several schedules, races and stray accesses reported."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch
from simt.twin import SEEDS, Device

from stackbert_kernels.ops.gelu import native

FORMS = ["none", "tanh"]
# Columns choose threads and accesses: several rows of a block (768, 64), one (2304: 288 vectors of 16 bits), several blocks
# side by side (4224 in fp32: 1056 vectors), single elements (37, and 515: two blocks). Rows: several turns of a block that
# keeps sums, the last not full.
SHAPES = [(5, 768), (203, 64), (2, 2304), (3, 4224), (9, 37), (2, 515), (300, 8), (1, 1)]


def problem(rows, columns, dtype, spread=3.0):
    torch.manual_seed(0)
    x, dy = (torch.randn(rows, columns) * spread).to(dtype), torch.randn(rows, columns).to(dtype)
    return {"dy": dy, "x": x, "bias": torch.randn(columns)}


def kernels(twin, t, approximate, seed=0):
    """y, dx, dbias"""
    with Device(twin, seed, t):
        y = native.bias_gelu_fwd_cuda(t["x"], t["bias"], approximate)
        return y, *native.bias_gelu_bwd_cuda(*t.values(), approximate)


def torchs(x, bias, dy, approximate):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = F.gelu(x + bias.to(x.dtype), approximate=approximate)
    return y.detach(), *torch.autograd.grad(y, (x, bias), dy)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_gelu(twin, shape, dtype, approximate):
    t = problem(*shape, dtype)
    seen = [kernels(twin, t, approximate, seed) for seed in (SEEDS if shape[1] < 515 else SEEDS[:2])]
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    exact = torchs(t["x"].double(), t["bias"].double(), t["dy"].double(), approximate)
    baseline = torchs(t["x"], t["bias"], t["dy"], approximate)
    for name, a, e, b in zip(("y", "dx", "dbias"), seen[0], exact, baseline, strict=True):
        assert_as_accurate_as_torch(name, a, e, b, slack=2.0 if name == "y" else 3.0)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_tails_keep_their_digits(twin, dtype, approximate):
    """Element by element, down to results that the dtype holds as normal numbers."""
    x = torch.linspace(-12.9 if approximate == "none" else -9.5, 9.0, 2048).to(dtype)[None]
    y, slope, _ = kernels(twin, {"dy": torch.ones_like(x), "x": x, "bias": torch.zeros(2048)}, approximate)
    u = x.double()
    if approximate == "none":
        cdf = 0.5 * torch.special.erfc(-u * 0.5**0.5)
        exact = u * cdf, cdf + u * torch.exp(-u * u / 2) / (2 * torch.pi) ** 0.5
    else:
        scale = 2 * (2 / torch.pi) ** 0.5
        cdf = torch.sigmoid(scale * (u + 0.044715 * u**3))
        exact = u * cdf, cdf + u * cdf * (1 - cdf) * scale * (1 + 3 * 0.044715 * u * u)
    # Of itself: half an ulp of rounding, and the larger of 1e-5 (4e-4 below -5) that the 16-bit form and 4e-6 that fp32 exponents
    # of up to 120 leave. The slope crosses zero: there and above 1 - 3e-7 its error is that of 1.
    info = torch.finfo(dtype)
    loose = torch.where(u < -5, 4e-4, 1e-5) if dtype != torch.float32 else torch.full_like(u, 8e-6)
    for got, want, floor in ((y, exact[0], 0.0), (slope, exact[1], 1e-6)):
        normal = want.abs() > info.tiny
        error = (got.double() - want).abs()[normal]
        allowed = ((info.eps / 2 + loose) * want.abs() + floor)[normal]
        assert (error <= allowed).all(), float((error / allowed).max())


def test_far_out_and_not_a_number(twin):
    x = torch.tensor([[1e4, -1e4, 1e30, -1e30, torch.nan, 0.0, -0.0, 20.0]])
    for approximate in FORMS:
        y, slope, _ = kernels(twin, {"dy": torch.ones_like(x), "x": x, "bias": torch.zeros(8)}, approximate)
        wanted = torch.tensor([[1e4, 0.0, 1e30, 0.0, torch.nan, 0.0, 0.0, 20.0]])
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
        wanted = torch.tensor([[1.0, 0.0, 1.0, 0.0, torch.nan, 0.5, 0.5, 1.0]])
        torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)], ids=str)
def test_nothing_to_do(twin, shape):
    y, dx, dbias = kernels(twin, problem(*shape, torch.bfloat16), "none")
    assert y.shape == dx.shape == shape and torch.equal(dbias, torch.zeros(shape[1]))


def test_rows_off_16_bytes(twin):
    """An address that allows no 16-byte access where the columns would: the same numbers one by one."""
    t = problem(5, 64, torch.bfloat16)
    off = torch.empty(5 * 64 + 1, dtype=torch.bfloat16)[1:].view(5, 64).copy_(t["x"])
    for a, b in zip(kernels(twin, t, "none"), kernels(twin, t | {"x": off}, "none"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # dbias adds up in another order
