"""Tensors for a step of AdamW and for a norm, and how far float32 may be off, counted from the formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stackbert_kernels import ops

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.1}
U = 2.0**-24  # one rounding to float32


@dataclass
class Regions:
    """A bank of three rows that count their own steps, of which a part decays; a matrix; a vector; a scalar."""

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    steps: list[Tensor]
    decay: list[int]

    def lists(self) -> tuple[list, ...]:
        return self.weights, self.grads, self.exp_avg, self.exp_avg_sq, self.steps, self.decay

    def tensors(self) -> list[Tensor]:
        return [t for tensors in self.lists()[:-1] for t in tensors]

    def clone(self, dtype: torch.dtype = torch.float32) -> Regions:
        changed = ([t.detach().to(dtype, copy=True) for t in tensors] for tensors in self.lists()[:4])
        return Regions(*changed, [t.clone() for t in self.steps], list(self.decay))


def regions(columns: int = 50, decay: int = 31) -> Regions:
    """Weights, gradients and moments of many magnitudes, zeros among them: what is rounded off must show."""
    shapes = [(3, columns), (5, 7), (9,), ()]

    def values(shape, scale):
        return torch.randn(shape) * 10 ** (4 * torch.rand(shape) - 4) * (torch.rand(shape) > 0.1) * scale

    return Regions(
        weights=[values(s, 0.1) for s in shapes],
        grads=[values(s, 1.0) for s in shapes],
        exp_avg=[values(s, 1.0) for s in shapes],
        exp_avg_sq=[values(s, 1.0).square() for s in shapes],
        steps=[torch.tensor([0.0, 4.0, 999.0]), *(torch.tensor(t) for t in (1.0, 70.0, 0.0))],
        decay=[decay, 35, 0, 0],
    )


def stepped(r: Regions, impl: str, **changes) -> Regions:
    after = r.clone(r.weights[0].dtype)
    assert ops.adamw_(*after.lists(), impl=impl, **(HYPER | changes)) is None
    return after


def bounds(r: Regions, factor: float = 1.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Most that float32 may be off for each weight and its moments, in units of one rounding: products of rounded constants and their
    sums. With M = beta1 |m| + (1 - beta1) |g|, s the step size and D the denominator: 5 for g (4 in the factor); 8 M for m; 14 v for v;
    11 D for the denominator (a root halves); 24 s M / D for the change of the weight, and 3 for the weight."""
    b1, b2 = HYPER["beta1"], HYPER["beta2"]
    out = []
    for w, g, m, v, t in zip(*r.clone(torch.float64).lists()[:4], r.steps, strict=True):
        g = g * factor
        t = (t.double() + 1).reshape(t.shape + (1,) * (w.dim() - t.dim()))
        M, V = b1 * m.abs() + (1 - b1) * g.abs(), b2 * v + (1 - b2) * g * g
        change = HYPER["lr"] / (1 - b1**t) * M / ((V / (1 - b2**t)).sqrt() + HYPER["eps"])
        out.append(tuple(1.01 * U * bound for bound in (3 * w.abs() + 24 * change, 8 * M, 14 * V)))
    return out


def assert_within(actual: Regions, exact: Regions, allowed: list[tuple[Tensor, ...]], slack: float = 1.0) -> None:
    smallest = torch.finfo(torch.float32).tiny  # below it a rounding is not relative
    for i, bound in enumerate(allowed):
        for name, most in zip(("weights", "exp_avg", "exp_avg_sq"), bound, strict=True):
            off = (getattr(actual, name)[i].double() - getattr(exact, name)[i].double()).abs()
            assert (off <= slack * most + smallest).all(), (
                f"{name}[{i}]: {(off / most).nan_to_num(0).max():.2f}x allowed"
            )
        assert torch.equal(actual.steps[i], exact.steps[i])


def same(a: Regions, b: Regions) -> bool:
    """Bit for bit, NaN included."""
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return all(torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32)) for x, y in pairs)


def norm_tensors(block: int) -> list[Tensor]:
    """Whole blocks, ends, an address of its own, a scalar, nothing; of magnitudes from 1e-15, whose square is still normal, to 1e15."""
    sizes = [(3, block), (2, block + 37), (5,), (), (0, 7)]
    tensors = [torch.randn(s) * 10.0 ** torch.randint(-15, 3, s) for s in sizes] + [torch.randn(2 * block + 1)[1:]]
    tensors[2] *= 1e15
    return tensors


def assert_norm(norm: Tensor, tensors: list[Tensor]) -> None:
    """A square and at most 136 sums in float32 stand behind each term, and a root halves what they are off; then it rounds."""
    exact = torch.cat([t.double().flatten() for t in tensors]).norm()
    assert norm.dtype == torch.float32 and norm.shape == ()
    assert abs(norm.double() - exact) <= 70 * U * exact, f"{norm} is not {exact}"
