"""Queries and keys that are narrower than values, widened with zeros to what attention takes.

T tokens, H heads, D head dim, C = H*D, r width of a head's queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _FillHeads(torch.autograd.Function):
    """One pass over memory each way, 3 C numbers written and (1 + 2 r / D) C read for a token or the reverse, where a pad, a join and their
    gradients would be several."""

    @staticmethod
    def forward(ctx, qkv: Tensor, H: int, D: int, r: int) -> Tensor:
        ctx.sizes = T, H, D, r = len(qkv), H, D, r
        full = qkv.new_empty(T, 3, H, D)
        full[:, :2, :, :r] = qkv[:, : 2 * H * r].view(T, 2, H, r)
        full[:, :2, :, r:] = 0
        full[:, 2] = qkv[:, 2 * H * r :].view(T, H, D)
        return full

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dfull: Tensor) -> tuple[Tensor, None, None, None]:
        T, H, D, r = ctx.sizes
        dqkv = dfull.new_empty(T, 2 * H * r + H * D)
        dqkv[:, : 2 * H * r].view(T, 2, H, r).copy_(dfull[:, :2, :, :r])
        dqkv[:, 2 * H * r :].view(T, H, D).copy_(dfull[:, 2])
        return dqkv, None, None, None


def fill_heads(qkv: Tensor, heads: int, head_dim: int, score_dim: int) -> Tensor:
    """qkv [T, 2 H r + H D], the queries of all heads, their keys, their values -> [T, 3, H, D], queries and keys ending in D - r zeros,
    which add nothing to a score."""
    return _FillHeads.apply(qkv, heads, head_dim, score_dim)
