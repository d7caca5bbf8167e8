"""The CUDA dropout and dropout_add on the host: masks bit by bit, sums against float64, races and stray accesses reported."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate_as_torch
from simt.twin import SEEDS, Device

from stackbert_kernels.ops import new_rng, philox
from stackbert_kernels.ops.dropout import native as dropout_native
from stackbert_kernels.ops.layer_norm import native, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# As in test_gelu_cuda.py: several rows of a block, one, several blocks side by side; 16-byte accesses and single elements.
SHAPES = [(5, 768), (203, 64), (2, 2304), (3, 4224), (9, 37), (2, 515), (300, 8), (1, 1)]
SITE = 5
MANY = 2**32 + 3  # of a seed and a step: both words of each count


def schedules(shape):
    return SEEDS if shape[1] < 515 else SEEDS[:2]


@pytest.mark.parametrize("threshold", [1, 26, 255])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout(twin, shape, dtype, threshold):
    """The mask of the reference bit by bit, and one rounding of each product: no freedom is left."""
    torch.manual_seed(0)
    x, rng = torch.randn(shape).to(dtype), new_rng(MANY, MANY)
    wanted = (x.float() * philox.row_factors(rng, SITE, threshold, x.float())).to(dtype)
    for seed in schedules(shape):
        with Device(twin, seed, {"x": x, "rng": rng}):
            y = dropout_native.dropout_cuda(x, rng, SITE, threshold)
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("threshold", [0, 26])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_add(twin, shape, dtype, threshold, with_bias):
    torch.manual_seed(0)
    t = {name: torch.randn(shape).to(dtype) for name in ("x", "residual", "dy")}
    x_bias, rng = torch.randn(shape[1]) if with_bias else None, new_rng(7, 3)
    x, residual, dy = t.values()
    seen = []
    for seed in schedules(shape) if with_bias else SEEDS[:2]:
        with Device(twin, seed, t | {"x_bias": x_bias, "rng": rng}):
            y = native.dropout_add_fwd_cuda(x, residual, x_bias, rng, SITE, threshold)
            dx, dx_bias = native.dropout_add_bwd_cuda(dy, x_bias, rng, SITE, threshold)
        seen.append((y, dx, dx_bias))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert torch.equal(dx, reference.dropout_add_bwd(dy, x_bias, rng, SITE, threshold)[0])  # one product, one rounding
    wide = [None if v is None else v.double() for v in (x, residual, x_bias)]
    exact = reference.dropout_add_fwd(*wide, rng, SITE, threshold)
    assert_as_accurate_as_torch("y", y, exact, reference.dropout_add_fwd(x, residual, x_bias, rng, SITE, threshold))
    if with_bias:
        exact = reference.dropout_add_bwd(dy.double(), x_bias.double(), rng, SITE, threshold)[1]
        baseline = reference.dropout_add_bwd(dy, x_bias, rng, SITE, threshold)[1]
        assert_as_accurate_as_torch("dx_bias", dx_bias, exact, baseline, slack=3.0)


@pytest.mark.parametrize("shape", [(0, 8), (0, 0)], ids=str)
def test_nothing_to_do(twin, shape):
    x, x_bias, rng = torch.empty(shape), torch.ones(shape[1]), new_rng(7, 3)
    with Device(twin, 0, {"x": x, "x_bias": x_bias, "rng": rng}):
        assert dropout_native.dropout_cuda(x, rng, SITE, 26).shape == shape
        assert native.dropout_add_fwd_cuda(x, x, x_bias, rng, SITE, 26).shape == shape
        dx, dx_bias = native.dropout_add_bwd_cuda(x, x_bias, rng, SITE, 26)
    assert dx.shape == shape and torch.equal(dx_bias, torch.zeros(shape[1]))


def test_rows_off_16_bytes(twin):
    """An address that allows no 16-byte access where the columns would: the same mask one by one."""
    x, rng = torch.randn(5, 64), new_rng(7, 3)
    off = torch.empty(5 * 64 + 1)[1:].view(5, 64).copy_(x)
    with Device(twin, 0, {"x": x, "off": off, "rng": rng}):
        assert torch.equal(*(dropout_native.dropout_cuda(v, rng, SITE, 26) for v in (x, off)))
        assert torch.equal(*(native.dropout_add_fwd_cuda(x, v, None, rng, SITE, 26) for v in (x, off)))
        assert torch.equal(*(native.dropout_add_bwd_cuda(v, None, rng, SITE, 26)[0] for v in (x, off)))
