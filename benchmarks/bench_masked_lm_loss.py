"""masked_lm_loss, forward and backward, beside F.cross_entropy(F.linear(...)): the decoder of a small and of a base model."""

from __future__ import annotations

import timing
import torch
import torch.nn.functional as F

from stackbert_kernels import ops

SHAPES = [(307, 128, 8192), (614, 768, 30528)]  # R masked rows (15% of 2,048 and of 4,096 tokens), C, V
MODES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32)}  # hidden; weight and bias


def flops(R: int, C: int, V: int, products: int) -> int:
    """Each of the three products (logits, dhidden, dweight) multiplies and adds R C V times."""
    return products * 2 * R * C * V


def measure(R: int, C: int, V: int, mode: str, frozen: bool, repeats: int) -> dict[str, object]:
    hidden_dtype, weight_dtype = MODES[mode]
    hidden = torch.randn(R, C, dtype=hidden_dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=weight_dtype).mul_(0.02).requires_grad_(not frozen)
    bias = torch.zeros(V, dtype=weight_dtype, requires_grad=True)
    labels = torch.randint(0, V, (R,))
    inputs = [t for t in (hidden, weight, bias) if t.requires_grad]

    def ours():
        return torch.autograd.grad(ops.masked_lm_loss(hidden, weight, bias, labels), inputs)

    def torchs():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "bf16"):
            logits = F.linear(hidden, weight, bias)
        return torch.autograd.grad(F.cross_entropy(logits.float(), labels), inputs)

    for a, b in zip(ours(), torchs(), strict=True):
        tolerance = 0.02 if mode == "bf16" else 1e-5
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * b.abs().max().item())
    stats = timing.compare({"ours": ours, "torch": torchs}, repeats=repeats)
    speedup = timing.speedup(stats, "torch", "ours")
    work = flops(R, C, V, 2 if frozen else 3)
    return {
        "R x C x V": f"{R} x {C} x {V}",
        "dtype": mode,
        "weight": "frozen" if frozen else "trained",
        "ours ms": 1e3 * stats["ours"].median,
        "torch ms": 1e3 * stats["torch"].median,
        "speed-up": speedup.median,
        "p20": speedup.p20,
        "p80": speedup.p80,
        "GFLOP/s": work / stats["ours"].median / 1e9,
    }


def main() -> None:
    options = timing.arguments(__doc__)
    rows = [
        measure(*shape, mode, frozen, options.repeats) for shape in SHAPES for mode in MODES for frozen in (False, True)
    ]
    timing.report(rows, options.json)


if __name__ == "__main__":
    main()
