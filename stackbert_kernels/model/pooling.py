"""Embeddings pooled over windows of tokens before the encoder (CompoundGrow, Gu et al. 2021, arXiv 2010.12562).

T tokens, P rows of the pooled stream, C columns. Each token is in exactly one window, so that both directions only gather: the same bits on
every device and with any number of threads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Pooled(Protocol):
    """What the model reads of the windows of a batch; data/windows.py makes them."""

    kind: str  # mean or max
    sources: Tensor  # [size, P] int64; a row of fewer tokens repeats its first
    counts: Tensor  # [P] int64
    rows: Tensor  # [T] int64
    places: Tensor  # [T] uint8
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    masked: Tensor  # [R] int64


def pool(x: Tensor, windows: Pooled) -> Tensor:
    """x [T, C] -> [P, C]: of each window the mean (summed in float32 or wider), or of each column the max; a window of one token is it."""
    if windows.kind == "mean":
        return _Mean.apply(x, windows.sources, windows.counts, windows.rows)
    return _Max.apply(x, windows.sources, windows.rows, windows.places)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sources: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(counts, rows)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.index_select(0, sources[0]).to(wide)
        for place in range(1, len(sources)):
            there = (counts > place).to(wide)[:, None]
            total.addcmul_(x.index_select(0, sources[place]).to(wide), there)
        return total.div_(counts.to(wide)[:, None]).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        counts, rows = ctx.saved_tensors
        wide = torch.promote_types(dy.dtype, torch.float32)
        return (dy.to(wide) / counts.to(wide)[:, None]).to(dy.dtype).index_select(0, rows), None, None, None


class _Max(torch.autograd.Function):
    """The first of equal values is the one that gets the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, sources: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        y = x.index_select(0, sources[0])
        which = torch.zeros_like(y, dtype=torch.uint8)
        for place in range(1, len(sources)):
            other = x.index_select(0, sources[place])
            which.masked_fill_(other > y, place)
            y = torch.maximum(y, other)
        ctx.save_for_backward(which, rows, places)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        which, rows, places = ctx.saved_tensors
        chosen = which.index_select(0, rows) == places[:, None]
        return dy.index_select(0, rows).mul_(chosen), None, None, None
