"""bias_gelu: y = gelu(x + bias), exact (erf) or by the tanh approximation. R rows, C columns: the inner size of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stackbert_kernels import ops

from .harness import BACKWARD, BOTH, FORWARD, FROZEN, Bench, Call, Case, Inputs, Peer
from .peers import compiled

APPROXIMATE = {"erf": "none", "tanh": "tanh"}


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(8, 64, "erf", torch.bfloat16 if device == "cuda" else torch.float32)]
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if device == "cpu":
        return [
            _case(R, 3072, form, dtype, directions=(BOTH,))
            for R, form, dtype in (
                (4096, "erf", fp32),
                (4096, "erf", bf16),
                (2048, "erf", fp32),
                (2048, "erf", bf16),
                (2048, "tanh", fp32),
                (2048, "tanh", bf16),
            )
        ]
    return [
        _case(65536, 3072, "erf", bf16, main=True, directions=(FORWARD, BACKWARD, FROZEN)),
        _case(65536, 4096, "erf", bf16),
        _case(65536, 3072, "tanh", bf16),
        _case(65536, 3072, "erf", fp16),
    ]


def _case(R: int, C: int, form: str, dtype: torch.dtype, **rest) -> Case:
    return Case(f"{R} x {C}", {"R": R, "C": C}, dtype, options={"form": form}, **rest)


def inputs(case: Case, device: str) -> Inputs:
    R, C = case["R"], case["C"]
    x, dy = (torch.randn(R, C, device=device).to(case.dtype) for _ in range(2))
    return {"x": x.requires_grad_(), "bias": torch.randn(C, device=device).requires_grad_(), "grad": dy}


def ours(case: Case, t: Inputs, impl: str) -> Call:
    approximate = APPROXIMATE[case.options["form"]]
    return lambda: ops.bias_gelu(t["x"], t["bias"], approximate=approximate, impl=impl)


def composite(x, bias, approximate: str):
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def by(function):
    return lambda case, t: lambda: function(t["x"], t["bias"], APPROXIMATE[case.options["form"]])


def bytes_moved(case: Case, direction: str) -> int:
    """forward reads x and writes y; backward reads x and dy and writes dx. The bias is small."""
    tensor = case["R"] * case["C"] * case.dtype.itemsize
    return tensor * {FORWARD: 2, FROZEN: 2, BACKWARD: 3, BOTH: 5}[direction]


BIAS_GELU = Bench(
    op="bias_gelu",
    folder="gelu",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(Peer("torch", by(composite)), Peer("torch.compile", compiled(composite, by))),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_gelu.py",
)

BENCHES = (BIAS_GELU,)
