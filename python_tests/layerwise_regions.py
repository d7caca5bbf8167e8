"""Steps of LAMB and LANS for tests: parts of rows, and how far float32 may be off, counted from the formulas."""

from __future__ import annotations

import torch
from optimizer_regions import HYPER, Regions, U, assert_within, same
from torch import Tensor

from stackbert_kernels import ops

__all__ = ["OPS", "assert_within", "bounds", "parts_of", "same", "stepped"]

OPS = {"lamb_": ops.lamb_, "lans_": ops.lans_}
SUMMED = (
    70  # roundings of a norm: at most 136 sums in float32 stand behind each square, and a root halves what they are off
)


def parts_of(r: Regions) -> list[list[int]]:
    """Up to four parts a row: two of what decays, two of what does not."""
    found = []
    for w, t, decay in zip(r.weights, r.steps, r.decay, strict=True):
        size = w.numel() // max(1, t.numel())
        rest = size - decay
        found.append([part for part in (decay // 3, decay - decay // 3, rest // 2, rest - rest // 2) if part])
    return found


def stepped(op: str, r: Regions, impl: str, **changes) -> Regions:
    after = r.clone(r.weights[0].dtype)
    assert OPS[op](*after.lists(), parts_of(r), impl=impl, **(HYPER | changes)) is None
    return after


def bounds(op: str, r: Regions, factor: float = 1.0, more: float = 0.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Most that float32 may be off for each weight and its moments. In units of one rounding, with e for the gradient (5: of its
    product and of the factor; `more` where that was rounded more often; in LANS also of its norm), M = beta1 |m| + (1 - beta1) |g|:
    (e + 3) M for m; (2 e + 4) v for v; e + 6 for the denominator D, where a root halves; so 2 e + 12 for m / D and 2 e + 7 for g / D,
    before what cancels in the sum; 3 for the decay's term. The error of a direction x makes its norm off by that error's norm at most."""
    lr, b1, b2, eps, wd = (HYPER[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    e = 5 + more + (SUMMED + 3 if op == "lans_" else 0)
    out = []
    rows = zip(*r.clone(torch.float64).lists()[:4], r.steps, r.decay, parts_of(r), strict=True)
    for weights, grads, exp_avg, exp_avg_sq, steps, decay, parts in rows:
        shape = (steps.numel(), sum(parts))
        most = [torch.zeros(shape, dtype=torch.float64) for _ in range(3)]
        w, g, m, v = (t.reshape(shape) for t in (weights, grads * factor, exp_avg, exp_avg_sq))
        for row, t in enumerate((steps.view(-1).double() + 1).unbind()):
            end = 0
            for size in parts:
                at, end = slice(end, end + size), end + size
                own = [x[row, at] for x in (w, g, m, v)]
                moved = _part(op, *own, t, (lr, b1, b2, eps, wd if at.start < decay else 0.0), e, at.start < decay)
                for to, value in zip(most, moved, strict=True):
                    to[row, at] = 1.01 * U * value
        out.append(tuple(x.view(weights.shape) for x in most))
    return out


def _part(op: str, w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, numbers, e: float, adapted: bool):
    lr, b1, b2, eps, wd = numbers
    if op == "lans_" and g.norm() > 0:
        g = g / (g.norm() + eps)
    mean, M, V = b1 * m + (1 - b1) * g, b1 * m.abs() + (1 - b1) * g.abs(), b2 * v + (1 - b2) * g * g
    down, correction = (V / (1 - b2**t)).sqrt() + eps, 1 - b1**t

    def change(x: Tensor, off: Tensor, share: float) -> Tensor:
        ratio, wrong = 1.0, 3.0
        if adapted and w.norm() > 0 and x.norm() > 0:
            ratio, wrong = w.norm() / x.norm(), 3 + 2 * SUMMED + off.norm() / x.norm()
        return lr * share * ratio * (off + wrong * x.abs())

    share = b1 if op == "lans_" else 1.0
    r = mean / correction / down + wd * w
    moved = change(r, (2 * e + 12) * M / correction / down + 3 * wd * w.abs(), share)
    if op == "lans_":
        moved = moved + change(g / down + wd * w, (2 * e + 7) * g.abs() / down + 3 * wd * w.abs(), 1 - b1)
    return 3 * w.abs() + moved, (e + 3) * M, (2 * e + 4) * V
