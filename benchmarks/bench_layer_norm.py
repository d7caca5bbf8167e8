"""layer_norm: y = (x - mean) rstd weight + bias over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stackbert_kernels import ops

from .harness import BACKWARD, BOTH, FORWARD, FROZEN, Bench, Case, Inputs, Peer
from .peers import compiled, liger_layer_norm

EPS = 1e-12
SHAPES = {"cuda": [(65536, 768), (65536, 1024)], "cpu": [(8192, 768), (2048, 768)]}  # (R, C)
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case("64 x 128", {"R": 64, "C": 128}, DTYPES[device][0])]
    return [
        Case(
            f"{R} x {C}",
            {"R": R, "C": C},
            dtype,
            directions=(FORWARD, BACKWARD, FROZEN) if device == "cuda" else (BOTH,),
        )
        for R, C in SHAPES[device]
        for dtype in DTYPES[device]
    ]


def inputs(case: Case, device: str) -> Inputs:
    R, C = case["R"], case["C"]
    x, dy = (torch.randn(R, C, device=device).to(case.dtype) for _ in range(2))
    weight, bias = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    return {"x": x.requires_grad_(), "weight": weight, "bias": bias, "grad": dy}


def ours(case: Case, t: Inputs, impl: str):
    return lambda: ops.layer_norm(t["x"], t["weight"], t["bias"], EPS, impl=impl)


def composite(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)


def of(function):
    return lambda case, t: lambda: function(t["x"], t["weight"], t["bias"])


def bytes_moved(case: Case, direction: str) -> int:
    """forward reads x and writes y, mean and rstd; backward reads x, dy, mean and rstd and writes dx. Weight and bias are small."""
    R, C = case["R"], case["C"]
    row, statistics = R * C * case.dtype.itemsize, R * 2 * 4
    forward, backward = 2 * row + statistics, 3 * row + statistics
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward, FROZEN: 2 * row}[direction]


LAYER_NORM = Bench(
    op="layer_norm",
    folder="layer_norm",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(
        Peer("torch", of(composite)),
        Peer("torch.compile", of(compiled(composite))),
        Peer("Liger", liger_layer_norm),
    ),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_layer_norm.py",
)

BENCHES = (LAYER_NORM,)
