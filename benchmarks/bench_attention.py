"""attention on packed tokens, forward and backward, beside F.scaled_dot_product_attention on the same sequences padded."""

from __future__ import annotations

import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from stackbert_kernels import ops

HEADS, HEAD_DIM = 4, 64
BATCHES = {  # the same 4,096 tokens in sequences of one length, and in sequences of natural lengths, which cost the peer padding
    "8 x 512": [512] * 8,
    "32 x 128": [128] * 32,
    "32 of 8..248": [*range(8, 256, 8), 128],
}


def flops(lengths: list[int]) -> int:
    """Two products forward, five backward (the scores again, dv, dp, dq, dk), each multiplying and adding S S D times a head."""
    return 7 * 2 * HEADS * HEAD_DIM * sum(length * length for length in lengths)


def check(qkv: Tensor, cu: Tensor, longest: int, dout: Tensor, p: float) -> None:
    """Against the reference in float64 with the same mask; the largest error allowed is 20 roundings of the largest value."""
    rng = ops.new_rng(0)

    def run(impl, dtype):
        x = qkv.detach().to(dtype).requires_grad_()
        y = ops.attention_qkv_varlen(x, cu, longest, dropout_p=p, rng=rng, impl=impl)
        return y.detach(), torch.autograd.grad(y, x, dout.to(dtype))[0]

    for ours, exact in zip(run("native", qkv.dtype), run("reference", torch.float64), strict=True):
        atol = 20 * torch.finfo(qkv.dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


def measure(name: str, dtype: torch.dtype, p: float, backward: bool, repeats: int) -> dict[str, object]:
    lengths = BATCHES[name]
    longest, sequences = max(lengths), len(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, dtype=dtype, requires_grad=backward)
    dout = torch.randn(sum(lengths), HEADS, HEAD_DIM, dtype=dtype)
    if backward:
        check(qkv, cu, longest, dout, p)
    rng = ops.new_rng(0)
    padded = torch.randn(3, sequences, HEADS, longest, HEAD_DIM, dtype=dtype)
    q, k, v = (x.requires_grad_(backward) for x in padded.unbind(0))
    dpadded = torch.randn(sequences, HEADS, longest, HEAD_DIM, dtype=dtype)
    mask = None
    if min(lengths) < longest:
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None, :]

    def ours():
        out = ops.attention_qkv_varlen(qkv, cu, longest, dropout_p=p, rng=rng, impl="native")
        return torch.autograd.grad(out, qkv, dout) if backward else out

    def torchs():
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return torch.autograd.grad(out, (q, k, v), dpadded) if backward else out

    a = torch.randn(1024, 1024)
    stats = timing.compare({"ours": ours, "torch": torchs, "mm": lambda: a @ a}, repeats=repeats)
    speedup = timing.speedup(stats, "torch", "ours")
    rate = flops(lengths) * (1 if backward else 2 / 7) / stats["ours"].median
    return {
        "lengths": name,
        "dtype": str(dtype).removeprefix("torch."),
        "p": p,
        "pass": "forward + backward" if backward else "forward",
        "ours ms": 1e3 * stats["ours"].median,
        "torch ms": 1e3 * stats["torch"].median,
        "speed-up": speedup.median,
        "p20": speedup.p20,
        "p80": speedup.p80,
        "GFLOP/s": rate / 1e9,
        "of fp32 mm": rate / (2 * 1024**3 / stats["mm"].median),
    }


def main() -> None:
    options = timing.arguments(__doc__)
    rows = [
        measure(name, dtype, p, backward, options.repeats)
        for dtype in (torch.float32, torch.bfloat16)
        for name in BATCHES
        for p, backward in ((0.1, True), (0.0, True), (0.0, False))
    ]
    timing.report(rows, options.json)


if __name__ == "__main__":
    main()
