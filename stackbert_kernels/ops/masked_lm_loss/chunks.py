"""The walk over chunks of rows that the implementations share: matrix products are torch's, the cross entropy of a chunk is theirs.

R rows, C columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LOGITS_BYTES = 64 * 2**20  # most bytes of logits that exist at a time (one row, if that is more)


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """labels: those that are not ignored, on the CPU."""
    if labels.numel() == 0:
        return
    for value in torch.aminmax(labels):
        if not 0 <= value < vocabulary:
            raise ValueError(f"masked_lm_loss: labels must be in [0, {vocabulary}) or ignore_index, got {int(value)}")


def logits_by_chunk(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, hidden[rows] weight^T), in one buffer that the next chunk overwrites."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    most = max(1, LOGITS_BYTES // (vocabulary * hidden.element_size()))
    step = -(-rows // max(1, -(-rows // most)))  # chunks of equal size: a small last one would make a slow product
    buffer = hidden.new_empty(step, vocabulary)
    for first in range(0, rows, max(1, step)):
        chunk = slice(first, min(first + step, rows))
        yield chunk, torch.mm(hidden[chunk], weight.t(), out=buffer[: chunk.stop - first])


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: int | Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    cross_entropy_: Callable[..., tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of losses / count, dhidden, dweight, dbias), by cross_entropy_(logits, rows, need_dlogits, need_bias) -> (losses, sum of dlogits over
    the rows), which puts dlogits in the place of logits. `rows` is the slice of all rows that the chunk is."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    need_dlogits = need_hidden or need_weight or need_bias
    loss = hidden.new_zeros((), dtype=torch.float64)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    allocate = torch.empty if hidden.shape[0] else torch.zeros  # the first chunk writes all of it
    dweight = allocate(weight.shape if need_weight else 0, dtype=wide, device=weight.device)
    dbias = bias.new_zeros(bias.shape if need_bias else 0, dtype=wide)
    # Autocast would change the products' dtype behind the caller's back: it is hidden's.
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(hidden.dtype)
        for rows, logits in logits_by_chunk(hidden, matrix):
            losses, column_sums = cross_entropy_(logits, rows, need_dlogits, need_bias)
            loss += losses.sum(dtype=torch.float64)
            dlogits = logits
            if need_hidden:
                torch.mm(dlogits, matrix, out=dhidden[rows])
            if need_weight and dweight.dtype == hidden.dtype:
                torch.addmm(dweight, dlogits.t(), hidden[rows], beta=int(rows.start > 0), out=dweight)
            elif need_weight:
                product = dlogits.t() @ hidden[rows]
                dweight = dweight.add_(product) if rows.start else dweight.copy_(product)
            if need_bias:
                dbias += column_sums
    return (loss / count).to(wide), dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)
