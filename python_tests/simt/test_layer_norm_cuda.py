"""The CUDA layer norm on the host: against float64, under several schedules, races and stray accesses reported."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate_as_torch
from simt.twin import SEEDS, Device

from stackbert_kernels.ops import new_rng
from stackbert_kernels.ops.layer_norm import native, reference

EPS = 1e-12
# Columns choose the kernel: 16-byte rows of one warp (768, 1024) and of several, odd ones, and rows that fill no vector.
SHAPES = [(5, 768), (3, 1024), (2, 1544), (3, 37), (9, 8), (2, 1033), (1, 8191), (1, 8192)]


def problem(rows, columns, dtype, seed=0):
    torch.manual_seed(seed)
    tensors = {name: torch.randn(rows, columns).to(dtype) for name in ("x", "residual", "dy")}
    return tensors | {name: torch.randn(columns) for name in ("weight", "bias", "x_bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_add_layer_norm(twin, shape, dtype):
    t, rng, threshold = problem(*shape, dtype), new_rng(7, 3), 26
    sites = (t["x"], t["residual"], t["weight"], t["bias"], t["x_bias"], rng, 5)
    exact64 = [v.double() if v.is_floating_point() else v for v in sites[:6]]
    y64, mean64, rstd64 = reference.dropout_add_layer_norm_fwd(*exact64, 5, threshold, EPS)
    base = reference.dropout_add_layer_norm_fwd(*sites[:6], 5, threshold, EPS)
    seen = []
    for seed in SEEDS if shape[1] <= 1024 else SEEDS[:2]:
        with Device(twin, seed, t | {"rng": rng}):
            y, mean, rstd = native.dropout_add_layer_norm_fwd_cuda(*sites, threshold, EPS)
            again = native.dropout_add_layer_norm_forward_only_cuda(*sites, threshold, EPS)
            got = native.dropout_add_layer_norm_bwd_cuda(t["dy"], *sites[:5], mean, rstd, rng, 5, threshold)
        assert torch.equal(y, again)
        seen.append((y, *got))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert_as_accurate_as_torch("y", y, y64, base[0])
    exact = reference.dropout_add_layer_norm_bwd(t["dy"].double(), *exact64[:5], mean64, rstd64, rng, 5, threshold)
    baseline = reference.dropout_add_layer_norm_bwd(t["dy"], *sites[:5], *base[1:], rng, 5, threshold)
    for name, a, e, b in zip(("dx", "dresidual", "dweight", "dbias", "dx_bias"), got, exact, baseline, strict=True):
        assert_as_accurate_as_torch(name, a, e, b, slack=3.0)
