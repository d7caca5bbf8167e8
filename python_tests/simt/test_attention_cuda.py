"""The CUDA attention on the host: against float64, packed and padded, with NaN in what must not be read."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate_as_torch
from simt.twin import Device

from stackbert_kernels.ops import new_rng
from stackbert_kernels.ops.attention import native, reference

# Which kernel runs depends on the longest: one tile of 64 keys, one of 128, or tiles of 64. Empty, single-token and odd lengths among them.
BATCHES = {"64": [64, 0, 1, 37], "128": [128, 70, 15], "long": [150, 0, 129, 64]}
H = 2


def composite(q, k, v, seqlens, scale):
    """PyTorch in the tensors' own dtype, a sequence at a time: what rounding costs there."""
    out = torch.zeros_like(q)
    for start, end in zip(seqlens[:-1].tolist(), seqlens[1:].tolist(), strict=True):
        x = [t[start:end].transpose(0, 1) for t in (q, k, v)]
        out[start:end] = ((x[0] @ x[1].transpose(-1, -2) * scale).softmax(-1) @ x[2]).transpose(0, 1)
    return out


def problem(batch, D, dtype, packed):
    lengths = torch.tensor(BATCHES[batch], dtype=torch.int32)
    seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)])
    T, S = int(lengths.sum()), int(lengths.max())
    fused = torch.randn(T, 3, H, D).to(dtype)
    if packed:
        return *fused.unbind(1), seqlens, S, seqlens
    padded = torch.full((len(lengths), S, 3, H, D), torch.nan, dtype=dtype)
    for b, n in enumerate(lengths.tolist()):
        padded[b, :n] = fused[seqlens[b] : seqlens[b] + n]
    return *padded.unbind(2), lengths, S, seqlens


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "D, dtype", [(64, torch.bfloat16), (64, torch.float16), (32, torch.bfloat16), (128, torch.float16)], ids=str
)
@pytest.mark.parametrize("batch", BATCHES)
def test_forward(twin, batch, D, dtype, packed):
    q, k, v, seqlens, S, cu = problem(batch, D, dtype, packed)
    rng, scale = new_rng(3, 4), D**-0.5
    for threshold in (0, 26):
        settings = (seqlens, S, scale, rng, 5, threshold)
        exact, exact_lse = reference.forward(*(torch.nan_to_num(x.double()) for x in (q, k, v)), *settings, True)
        for seed in range(2):
            inputs = {"qkv": q, "seqlens": seqlens, "rng": rng}
            with Device(twin, seed, inputs):
                out, lse = native.forward_cuda(q, k, v, *settings, True)
                again, none = native.forward_cuda(q, k, v, *settings, False)
            assert torch.equal(out, again) and none.numel() == 0
            flat = (
                (lambda x: x) if packed else (lambda x: torch.cat([x[b, :n] for b, n in enumerate(seqlens.tolist())]))
            )
            base = composite(*(flat(x) for x in (q, k, v)), cu, scale)
            base_exact = composite(*(flat(x).double() for x in (q, k, v)), cu, scale)
            error = base.double() - base_exact
            assert_as_accurate_as_torch("out", flat(out), flat(exact), (flat(exact) + error * 256 / (256 - threshold)))
            torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)  # scores of |s| < 8 in fp32
            if not packed:
                assert all((out[b, n:] == 0).all() for b, n in enumerate(seqlens.tolist()))
