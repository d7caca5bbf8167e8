"""How near vectors are to those of a teacher.

T tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mean_cosine(x: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of the cosine between x and target [T, C], a scalar in [-1, 1]; the gradient is that of x alone.

    Statistics are float32 or wider whatever the inputs are; nothing of [T, C] is kept for the backward pass but the inputs. A vector of
    zeros has the cosine 0 and the gradient 0.
    """
    if x.dim() != 2 or x.shape != target.shape:
        raise ValueError(f"mean_cosine: x and target must both be [T, C], got {list(x.shape)} and {list(target.shape)}")
    return _MeanCosine.apply(x, target)


class _MeanCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor) -> Tensor:
        a, b = _wide(x), _wide(target)
        over_a, over_b = _inverse_norm(a), _inverse_norm(b)  # [T]
        cosine = ((a * b).sum(-1) * over_a * over_b).clamp(-1, 1)  # rounding may pass 1
        ctx.save_for_backward(x, target, over_a, over_b, cosine)
        return cosine.sum() / max(1, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        x, target, over_a, over_b, cosine = ctx.saved_tensors
        # d cosine / d a = (b / |b| - cosine * a / |a|) / |a|
        scale = dy * over_a / max(1, len(x))
        dx = _wide(target) * (scale * over_b)[:, None]
        return dx.addcmul_(_wide(x), (scale * over_a * cosine)[:, None], value=-1).to(x.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| of each row, 0 where |x| is 0."""
    square = (x * x).sum(-1)
    return torch.where(square > 0, square.rsqrt(), 0.0)
