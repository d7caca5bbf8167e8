"""A shorter stream for the encoder: windows of tokens that are pooled, between [CLS] and the tokens that are predicted.

Of a sequence of n tokens with u predicted ones, the stream has [CLS], then a row for each window of `size` neighbours among the n - 1 - u
others (the last window has what is left), then the u predicted tokens in their order: 1 + ceil((n - 1 - u) / size) + u rows. Every token
knows its position from its embedding, so that no position embedding is left out. Nothing is padded: a window holds tokens of one sequence.

B sequences, T packed tokens, P rows of the stream, R predicted tokens. Computed on the host, by arrays over the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    kind: str  # mean or max
    sources: Tensor  # [size, P] int64: the tokens of each row; one that has fewer repeats its first
    counts: Tensor  # [P] int64: how many tokens a row is made of
    rows: Tensor  # [T] int64: the row that each token is in
    places: Tensor  # [T] uint8: and where in it
    cu_seqlens: Tensor  # [B + 1] int32, of the rows
    max_seqlen: int
    masked: Tensor  # [R] int64: the rows of the predicted tokens, in the order of Batch.masked

    def to(self, device: torch.device | str) -> Windows:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Windows(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})


def windows(cu_seqlens: Tensor, masked: Tensor, size: int, kind: str = "mean") -> Windows:
    """cu_seqlens [B + 1], masked [R] sorted, as in Batch; no sequence is empty, and none predicts its first token."""
    cu, masked = cu_seqlens.numpy().astype(np.int64), masked.numpy()
    lengths, first, total = np.diff(cu), cu[:-1], int(cu[-1])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    between = np.ones(total, dtype=bool)
    between[masked] = False
    if (lengths == 0).any() or not between[first].all():
        raise ValueError("windows: each sequence must begin with a token that is not predicted")
    between[first] = False
    tokens = np.flatnonzero(between)

    predicted = np.bincount(sequence[masked], minlength=len(lengths))
    pooled = lengths - 1 - predicted
    in_windows = -(-pooled // size)
    new_cu = np.concatenate([[0], (1 + in_windows + predicted).cumsum()])
    rank = _ranks(sequence[tokens], pooled)

    rows, places = np.empty(total, dtype=np.int64), np.zeros(total, dtype=np.uint8)
    rows[first] = new_cu[:-1]
    rows[tokens] = new_cu[sequence[tokens]] + 1 + rank // size
    rows[masked] = (new_cu[:-1] + 1 + in_windows)[sequence[masked]] + _ranks(sequence[masked], predicted)
    places[tokens] = rank % size
    sources = np.empty((size, new_cu[-1]), dtype=np.int64)
    firsts = np.flatnonzero(places == 0)
    sources[:, rows[firsts]] = firsts
    sources[places, rows] = np.arange(total)
    return Windows(
        kind=kind,
        sources=torch.from_numpy(sources),
        counts=torch.from_numpy(np.bincount(rows, minlength=new_cu[-1])),
        rows=torch.from_numpy(rows),
        places=torch.from_numpy(places),
        cu_seqlens=torch.from_numpy(new_cu.astype(np.int32)),
        max_seqlen=int(np.diff(new_cu).max(initial=0)),
        masked=torch.from_numpy(rows[masked]),
    )


def _ranks(sequence: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each sequence; `sequence` is sorted and has counts[b] entries b."""
    return np.arange(len(sequence)) - (counts.cumsum() - counts)[sequence]
