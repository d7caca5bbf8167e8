"""The CUDA attention on the host: against float64, packed and padded, with NaN in what must not be read."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate_as_torch
from simt.twin import SEEDS, Device

from stackbert_kernels import ops
from stackbert_kernels.ops import _triton, new_rng
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


def flat(x, seqlens, packed):
    """The real tokens of a packed or padded tensor, [T, H, D]."""
    return x if packed else torch.cat([x[b, :n] for b, n in enumerate(seqlens.tolist())])


def composite_gradients(q, k, v, dout, cu, scale):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = composite(*leaves, cu, scale)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


CASES = [("64", 64, torch.bfloat16, True), ("128", 64, torch.float16, False), ("long", 64, torch.bfloat16, True),
         ("long", 64, torch.bfloat16, False), ("128", 32, torch.bfloat16, True), ("long", 128, torch.float16, True)]  # fmt: skip


@pytest.mark.parametrize("threshold", [0, 26])
@pytest.mark.parametrize("batch, D, dtype, packed", CASES, ids=str)
def test_forward_and_backward(twin, batch, D, dtype, packed, threshold):
    q, k, v, seqlens, S, cu = problem(batch, D, dtype, packed)
    dout = torch.randn_like(torch.nan_to_num(q)) if packed else torch.where(q.isnan(), q, torch.randn_like(q))
    rng, scale = new_rng(3, 4), D**-0.5
    settings = (seqlens, S, scale, rng, 5, threshold)
    runs = []
    for seed in SEEDS[:2]:
        with Device(twin, seed, {"qkv": q, "dout": dout, "seqlens": seqlens, "rng": rng}):
            out, lse = native.forward_cuda(q, k, v, *settings, True)
            again, none = native.forward_cuda(q, k, v, *settings, False)
            gradients = native.backward_cuda(dout, q, k, v, out, lse, *settings)
        assert torch.equal(out, again) and none.numel() == 0
        runs.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "the schedule decides the result"

    wide = [torch.nan_to_num(x.double()) for x in (q, k, v)]
    exact, exact_lse = reference.forward(*wide, *settings, True)
    exact_gradients = reference.backward(torch.nan_to_num(dout.double()), *wide, exact, exact_lse, *settings)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)  # scores of |s| < 8 in fp32
    # What rounding costs PyTorch without dropout; what dropout keeps it scales, and the error with it.
    real = [flat(x, seqlens, packed) for x in (q, k, v, dout)]
    low = composite_gradients(*real, cu, scale)
    high = composite_gradients(*(x.double() for x in real), cu, scale)
    names = ("out", "dq", "dk", "dv")
    for name, a, e, b, h in zip(names, (out, *gradients), (exact, *exact_gradients), low, high, strict=True):
        truth = flat(e, seqlens, packed)
        error = (b.double() - h) * (256 / (256 - threshold)) ** (1 if name == "out" else 2)
        assert_as_accurate_as_torch(name, flat(a, seqlens, packed), truth, truth + error, 2.0 if name == "out" else 3.0)
        if not packed:
            assert all((a[b, n:] == 0).all() for b, n in enumerate(seqlens.tolist())), name


@pytest.mark.parametrize("length", [37, 128, 130], ids=["one tile of 64", "one tile of 128", "tiles of 64"])
def test_no_schedule_decides(twin, length):
    qkv, dout, rng = torch.randn(length, 3, 1, 64).bfloat16(), torch.randn(length, 1, 64).bfloat16(), new_rng(1)
    seqlens = torch.tensor([0, length], dtype=torch.int32)
    settings = (seqlens, length, 0.125, rng, 0, 26)
    runs = []
    for seed in SEEDS:
        with Device(twin, seed, {"qkv": qkv, "dout": dout, "seqlens": seqlens, "rng": rng}):
            out, lse = native.qkv_forward_cuda(qkv, *settings, True)
            runs.append((out, lse, native.qkv_backward_cuda(dout, qkv, out, lse, *settings)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("length", [37, 128, 130], ids=["one tile of 64", "one tile of 128", "tiles of 64"])
def test_masks_are_those_of_the_reference(twin, length, impl):
    """Scores of 0 and values that are columns of the identity make the output the mask itself, 64 keys at a time; and those of the
    C++ and Triton kernels on the CPU are the same."""
    if impl == "triton" and (reason := _triton.why_not("cpu")):
        pytest.skip(reason)
    rng, seqlens = new_rng(7, 2), torch.tensor([0, length], dtype=torch.int32)
    q = torch.zeros(length, H, 64)
    for first in range(0, length, 64):
        v = torch.zeros(length, H, 64)
        keys = torch.arange(first, min(first + 64, length))
        v[keys, :, keys - first] = 1.0
        settings = {"dropout_p": 0.25, "rng": rng, "site": 9}
        wanted = ops.attention_varlen(q, q, v, seqlens, length, **settings, impl="reference") != 0
        assert 0.7 < wanted[:, :, : len(keys)].float().mean() < 0.8
        assert torch.equal(ops.attention_varlen(q, q, v, seqlens, length, **settings, impl=impl) != 0, wanted)
        for seed in SEEDS[:2]:
            zero, columns = q.bfloat16(), v.bfloat16()
            with Device(twin, seed, {"q": zero, "v": columns, "seqlens": seqlens, "rng": rng}):
                out, _ = native.forward_cuda(zero, zero, columns, seqlens, length, 0.125, rng, 9, 64, False)
            assert torch.equal(out != 0, wanted)


def test_fused_qkv(twin):
    """Views of one tensor in, one dense gradient out."""
    qkv, rng = torch.randn(40, 3, H, 64).bfloat16(), new_rng(1)
    seqlens = torch.tensor([0, 33, 40], dtype=torch.int32)
    settings = (seqlens, 33, 0.125, rng, 0, 26)
    dout = torch.randn(40, H, 64).bfloat16()
    with Device(twin, 0, {"qkv": qkv, "dout": dout, "seqlens": seqlens, "rng": rng}):
        out, lse = native.qkv_forward_cuda(qkv, *settings, True)
        dqkv = native.qkv_backward_cuda(dout, qkv, out, lse, *settings)
        separate = native.backward_cuda(dout, *qkv.unbind(1), out, lse, *settings)
    assert torch.equal(dqkv, torch.stack(separate, 1))
