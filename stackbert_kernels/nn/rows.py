"""A batch with padding as rows: the form that attention over packed tokens takes, and the way back.

B sequences, S padded length, N = B S places, T tokens, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows(NamedTuple):
    """How the rows [R, C] of a batch are arranged: each sequence is rows cu_seqlens[i] to cu_seqlens[i + 1].

    `packed`: the rows are the tokens, and places of padding become zero on the way back. Else they are all places, the padding of each
    sequence behind its tokens as a sequence of its own: nothing of it reaches a token, and no size depends on what the mask holds.
    """

    cu_seqlens: Tensor  # [sequences + 1] int32
    max_seqlen: int
    places: (
        Tensor | None
    )  # [R] int64: row r stands at this place of the flattened batch; None = row r is place r of [B, S]
    shape: tuple[int, ...]  # of the batch, without C: [B, S], [S, B] or [S]
    batch_first: bool  # which of the first two

    def enter(self, x: Tensor) -> Tensor:
        """[*shape, C] -> [R, C]"""
        if self.places is not None:
            return x.reshape(-1, x.shape[-1]).index_select(0, self.places)
        return (x if self.batch_first else x.transpose(0, 1)).reshape(-1, x.shape[-1])

    def leave(self, rows: Tensor) -> Tensor:
        """[R, C] -> [*shape, C]"""
        if self.places is not None:
            flat = rows.new_zeros(_product(self.shape), rows.shape[1]).index_copy(0, self.places, rows)
            return flat.view(*self.shape, rows.shape[1])
        if self.batch_first:
            return rows.view(*self.shape, rows.shape[1])
        return rows.view(*reversed(self.shape), rows.shape[1]).transpose(0, 1).contiguous()


def arrange(x: Tensor, padding: Tensor | None, *, batch_first: bool, packed: bool) -> Rows:
    """x [B, S, C], [S, B, C] unless batch_first, or [S, C]; padding bool [B, S] ([S]), True = no token; any pattern.

    With `packed` and padding it waits for the device, to know how many tokens there are.
    """
    shape = tuple(x.shape[:-1])
    batch_first = batch_first or len(shape) == 1
    B, S = (1, *shape) if len(shape) == 1 else shape if batch_first else shape[::-1]
    if padding is None:
        ends = torch.arange(B + 1, dtype=torch.int32, device=x.device) * S
        return Rows(ends, S, None, shape, batch_first)
    keep = padding.logical_not().view(B, S)
    lengths = keep.sum(1)
    if packed:
        places = keep.flatten().nonzero().flatten()
        cu_seqlens, longest = F.pad(lengths.cumsum(0), (1, 0)), int(lengths.max()) if B else 0
    else:
        begins = torch.arange(B, device=x.device)[:, None] * S
        places = (torch.argsort(padding.view(B, S).byte(), dim=1, stable=True) + begins).flatten()
        cu_seqlens = F.pad(torch.cat([begins + lengths[:, None], begins + S], 1).flatten(), (1, 0))
        longest = S
    if not batch_first:
        places = places % S * B + places // S
    return Rows(cu_seqlens.int(), longest, places, shape, batch_first)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
