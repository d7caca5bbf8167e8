"""layer_norm, alone and behind BERT's dropout and residual; dropout and residual without it. R rows, C columns.

layer_norm              y = (x - mean) rstd weight + bias over the last dimension
dropout_add_layer_norm  y = layer_norm(residual + dropout(x + x_bias))
dropout_add             y = residual + dropout(x + x_bias)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stackbert_kernels import ops

from .harness import BACKWARD, BOTH, FORWARD, FROZEN, Bench, Call, Case, Inputs, Peer
from .peers import apex_fast_layer_norm, apex_layer_norm, compiled, liger_layer_norm

EPS = 1e-12
GPU_DIRECTIONS = (FORWARD, BACKWARD, FROZEN)


def _case(R: int, C: int, dtype: torch.dtype, p: float = 0.0, **rest) -> Case:
    return Case(f"{R} x {C}", {"R": R, "C": C}, dtype, p, **rest)


def _quick(device: str, p: float) -> list[Case]:
    return [_case(8, 64, torch.bfloat16 if device == "cuda" else torch.float32, p)]


def _on_cpu(p: float, sizes: tuple[int, ...]) -> list[Case]:
    return [_case(R, 768, dtype, p, directions=(BOTH,)) for R in sizes for dtype in (torch.float32, torch.bfloat16)]


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return _quick(device, 0.0)
    if device == "cpu":
        return _on_cpu(0.0, (8192,))
    return [
        _case(65536, 768, torch.bfloat16, directions=GPU_DIRECTIONS, main=True),
        _case(65536, 1024, torch.bfloat16),
        _case(65536, 768, torch.float16),
    ]


def fused_cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return _quick(device, 0.1)
    if device == "cpu":
        return [*_on_cpu(0.1, (8192, 2048)), *_on_cpu(0.0, (4096,))]
    return [
        _case(65536, 768, torch.bfloat16, 0.1, directions=GPU_DIRECTIONS, main=True),
        _case(65536, 768, torch.bfloat16, 0.0),
        _case(65536, 1024, torch.bfloat16, 0.1),
        _case(65536, 1024, torch.bfloat16, 0.0),
        _case(65536, 768, torch.float16, 0.1),
    ]


def add_cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return _quick(device, 0.1)
    if device == "cpu":
        return _on_cpu(0.1, (8192,))
    return [_case(65536, 768, torch.bfloat16, 0.1), _case(65536, 1024, torch.bfloat16, 0.1)]


def inputs(case: Case, device: str) -> Inputs:
    R, C = case["R"], case["C"]
    x, dy = (torch.randn(R, C, device=device).to(case.dtype) for _ in range(2))
    weight, bias = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    return {"x": x.requires_grad_(), "weight": weight, "bias": bias, "grad": dy}


def add_inputs(case: Case, device: str) -> Inputs:
    R, C = case["R"], case["C"]
    x, residual, dy = (torch.randn(R, C, device=device).to(case.dtype) for _ in range(3))
    return {
        "x": x.requires_grad_(),
        "residual": residual.requires_grad_(),
        "x_bias": torch.randn(C, device=device).requires_grad_(),
        "rng": ops.new_rng(0, device=device),
        "grad": dy,
    }


def fused_inputs(case: Case, device: str) -> Inputs:
    return add_inputs(case, device) | {
        name: torch.randn(case["C"], device=device).requires_grad_() for name in ("weight", "bias")
    }


def ours(case: Case, t: Inputs, impl: str) -> Call:
    return lambda: ops.layer_norm(t["x"], t["weight"], t["bias"], EPS, impl=impl)


def fused_ours(case: Case, t: Inputs, impl: str) -> Call:
    return lambda: ops.dropout_add_layer_norm(
        t["x"], t["residual"], t["weight"], t["bias"], x_bias=t["x_bias"],
        dropout_p=case.p, rng=t["rng"], eps=EPS, impl=impl,
    )  # fmt: skip


def add_ours(case: Case, t: Inputs, impl: str) -> Call:
    return lambda: ops.dropout_add(t["x"], t["residual"], x_bias=t["x_bias"], dropout_p=case.p, rng=t["rng"], impl=impl)


def composite(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)


def add_composite(x, residual, x_bias, p: float):
    return residual + F.dropout(x + x_bias.to(x.dtype), p)


def fused_composite(x, residual, x_bias, weight, bias, p: float):
    return composite(add_composite(x, residual, x_bias, p), weight, bias)


def by(function):
    return lambda case, t: lambda: function(t["x"], t["weight"], t["bias"])


def add_by(function):
    return lambda case, t: lambda: function(t["x"], t["residual"], t["x_bias"], case.p)


def fused_by(function):
    return lambda case, t: lambda: function(t["x"], t["residual"], t["x_bias"], t["weight"], t["bias"], case.p)


def _bytes(case: Case, direction: str, forward: int, backward: int, statistics: bool) -> int:
    """From the tensors [R, C] that each pass reads and writes; mean and rstd are written by forward and read by backward. What is [C] is
    small, and a dropout mask is drawn again."""
    row, saved = case["R"] * case["C"] * case.dtype.itemsize, 8 * case["R"] if statistics else 0
    return {
        FORWARD: forward * row + saved,
        BACKWARD: backward * row + saved,
        BOTH: (forward + backward) * row + 2 * saved,
        FROZEN: forward * row,
    }[direction]


def bytes_moved(case: Case, direction: str) -> int:
    """forward: x, y; backward: x, dy, dx."""
    return _bytes(case, direction, 2, 3, statistics=True)


def fused_bytes_moved(case: Case, direction: str) -> int:
    """forward: x, residual, y; backward: x, residual, dy, dresidual, and dx where dropout makes it another. (Storing the sum in forward
    moves one tensor from backward to forward: together they move as many.)"""
    return _bytes(case, direction, 3, 5 if case.p else 4, statistics=True)


def add_bytes_moved(case: Case, direction: str) -> int:
    """forward: x, residual, y; backward: dy, dx (dresidual is dy itself)."""
    return _bytes(case, direction, 3, 2, statistics=False)


LAYER_NORM = Bench(
    op="layer_norm",
    folder="layer_norm",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(
        Peer("torch", by(composite)),
        Peer("torch.compile", compiled(composite, by)),
        Peer("Liger", liger_layer_norm(EPS)),
        Peer("apex", apex_layer_norm(EPS)),
        Peer("apex fast", apex_fast_layer_norm(EPS)),
    ),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_layer_norm.py",
)

DROPOUT_ADD_LAYER_NORM = Bench(
    op="dropout_add_layer_norm",
    folder="layer_norm",
    cases=fused_cases,
    inputs=fused_inputs,
    ours=fused_ours,
    peers=(Peer("torch", fused_by(fused_composite)), Peer("torch.compile", compiled(fused_composite, fused_by))),
    bytes_moved=fused_bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_layer_norm.py",
)

DROPOUT_ADD = Bench(
    op="dropout_add",
    folder="layer_norm",
    cases=add_cases,
    inputs=add_inputs,
    ours=add_ours,
    peers=(Peer("torch", add_by(add_composite)), Peer("torch.compile", compiled(add_composite, add_by))),
    bytes_moved=add_bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_layer_norm.py",
)

BENCHES = (DROPOUT_ADD_LAYER_NORM, LAYER_NORM, DROPOUT_ADD)
