"""dropout alone: behind the embeddings and before a classifier. R rows, C columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stackbert_kernels import ops

from .harness import BACKWARD, BOTH, FORWARD, Bench, Call, Case, Inputs, Peer
from .peers import compiled

P = 0.1  # p = 0 returns x itself


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(8, 64, torch.bfloat16 if device == "cuda" else torch.float32)]
    if device == "cpu":
        return [_case(8192, 768, dtype, directions=(BOTH,)) for dtype in (torch.float32, torch.bfloat16)]
    return [_case(65536, 768, torch.bfloat16), _case(65536, 1024, torch.bfloat16)]


def _case(R: int, C: int, dtype: torch.dtype, **rest) -> Case:
    return Case(f"{R} x {C}", {"R": R, "C": C}, dtype, P, **rest)


def inputs(case: Case, device: str) -> Inputs:
    x, dy = (torch.randn(case["R"], case["C"], device=device).to(case.dtype) for _ in range(2))
    return {"x": x.requires_grad_(), "rng": ops.new_rng(0, device=device), "grad": dy}


def ours(case: Case, t: Inputs, impl: str) -> Call:
    return lambda: ops.dropout(t["x"], case.p, rng=t["rng"], impl=impl)


def by(function):
    return lambda case, t: lambda: function(t["x"], case.p)


def bytes_moved(case: Case, direction: str) -> int:
    """Each pass reads a tensor and writes one; the mask is drawn again."""
    tensor = case["R"] * case["C"] * case.dtype.itemsize
    return tensor * {FORWARD: 2, BACKWARD: 2, BOTH: 4}[direction]


DROPOUT = Bench(
    op="dropout",
    folder="dropout",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(Peer("torch", by(F.dropout)), Peer("torch.compile", compiled(F.dropout, by))),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_dropout.py",
)

BENCHES = (DROPOUT,)
