"""masked_lm_loss: decoder and cross entropy of the masked tokens, with their gradients. R masked rows, C columns, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stackbert_kernels import ops

from .harness import BOTH, FROZEN, Bench, Call, Case, Inputs, Peer
from .peers import apex_cross_entropy, compiled, liger_cross_entropy, liger_fused_linear_cross_entropy

V = 30528
MASKED = 9830  # 15% of 65,536 tokens


def cases(device: str, quick: bool) -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        return [_case(8, 16, 96, bf16 if device == "cuda" else fp32)]
    if device == "cpu":  # 15% of 2,048 tokens of a small model, and of a base model
        return [
            _case(307, 768, V, fp32),
            _case(307, 768, V, bf16),
            _case(307, 768, V, bf16, "frozen"),
            _case(307, 128, 8192, fp32),
            _case(307, 128, 8192, bf16),
        ]
    return [
        _case(MASKED, 768, V, bf16, main=True),
        _case(MASKED, 1024, V, bf16),
        _case(MASKED, 768, V, bf16, "frozen", directions=(BOTH, FROZEN)),
        _case(MASKED, 768, V, fp16),
    ]


def _case(R: int, C: int, V: int, dtype: torch.dtype, weight: str = "trained", **rest) -> Case:
    rest.setdefault("directions", (BOTH,))  # the gradients are made in the forward pass
    return Case(f"{R} x {C} x {V}", {"R": R, "C": C, "V": V}, dtype, options={"weight": weight}, **rest)


def inputs(case: Case, device: str) -> Inputs:
    """On a GPU the weight is in hidden's dtype; on a CPU it is the float32 parameter, as there in training."""
    R, C, V = case["R"], case["C"], case["V"]
    hidden = torch.randn(R, C, device=device).to(case.dtype)
    weight = (0.02 * torch.randn(V, C, device=device)).to(case.dtype if device == "cuda" else torch.float32)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(case.options["weight"] == "trained"),
        "bias": torch.zeros(V, device=device).requires_grad_(),
        "labels": torch.randint(V, (R,), device=device),
        "grad": torch.ones((), device=device),
    }


def ours(case: Case, t: Inputs, impl: str) -> Call:
    return lambda: ops.masked_lm_loss(t["hidden"], t["weight"], t["bias"], t["labels"], impl=impl)


def composite(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype)).float(), labels)


def by(function):
    return lambda case, t: lambda: function(t["hidden"], t["weight"], t["bias"], t["labels"])


def bytes_moved(case: Case, direction: str) -> int:
    """Inputs read once and gradients written once; logits need not leave the chip. The bias is small."""
    hidden = case["R"] * case["C"] * case.dtype.itemsize
    weight = case["V"] * case["C"] * case.dtype.itemsize
    if direction == FROZEN:
        return hidden + weight
    return 2 * hidden + (2 if case.options["weight"] == "trained" else 1) * weight


def flops(case: Case, direction: str) -> int:
    """The products logits, dhidden and (of a trained weight) dweight."""
    products = 1 if direction == FROZEN else 3 if case.options["weight"] == "trained" else 2
    return products * 2 * case["R"] * case["C"] * case["V"]


MASKED_LM_LOSS = Bench(
    op="masked_lm_loss",
    folder="masked_lm_loss",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(
        Peer("torch", by(composite)),
        Peer("torch.compile", compiled(composite, by)),
        Peer("Liger fused linear", liger_fused_linear_cross_entropy),
        Peer("Liger", liger_cross_entropy),
        Peer("apex", apex_cross_entropy),
    ),
    bytes_moved=bytes_moved,
    flops=flops,
    test="python_tests/ops/test_masked_lm_loss.py",
)

BENCHES = (MASKED_LM_LOSS,)
