"""The walk over chunks of rows that the implementations share: matrix products are torch's, the cross entropy of a chunk is theirs.

R rows, C columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LOGITS_BYTES = 64 * 2**20  # most bytes of logits that exist at a time (one row, if that is more)
PRODUCT_BYTES = 2 * 2**20  # of a product that waits on a GPU for its addition to the gradient of weight

# From here on torch.addmm adds products of 16-bit matrices to a float32 one, in the GPU's own accumulators.
FLOAT32_SUMS_FROM = (2, 11)


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """labels: those that are not ignored, on the CPU."""
    if labels.numel() == 0:
        return
    for value in torch.aminmax(labels):
        if not 0 <= value < vocabulary:
            raise ValueError(f"masked_lm_loss: labels must be in [0, {vocabulary}) or ignore_index, got {int(value)}")


def without_ignored(
    hidden: Tensor, labels: Tensor, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden with zeros in the ignored rows, which rows are not, and how many those are (at least 1; float32 or wider).

    All of it stays on the device: the host need not wait for a GPU to count.
    """
    valid = labels != ignore_index
    if labels.device.type == "cpu":
        check_labels(labels[valid], vocabulary)
    count = valid.sum().clamp(min=1).to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden.masked_fill(~valid[:, None], 0), valid, count


def logits_by_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, most_bytes: int | None = None, multiple: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, hidden[rows] weight^T + bias), in one buffer that the next chunk overwrites.

    most_bytes of logits at a time, LOGITS_BYTES if not given. All chunks but the last have a multiple of `multiple` rows, if that fits.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    most = max(1, (LOGITS_BYTES if most_bytes is None else most_bytes) // (vocabulary * hidden.element_size()))
    if most > multiple:
        most -= most % multiple
    step = -(-rows // max(1, -(-rows // most)))  # chunks of equal size: a small last one would make a slow product
    step = min(most, rows, -(-step // multiple) * multiple)
    buffer = hidden.new_empty(step, vocabulary)
    for first in range(0, rows, max(1, step)):
        chunk = slice(first, min(first + step, rows))
        logits = buffer[: chunk.stop - first]
        if bias is None:
            torch.mm(hidden[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[chunk], weight.t(), out=logits)
        yield chunk, logits


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: int | Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    cross_entropy_: Callable[..., Tensor | None],
    most_bytes: int | None = None,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of losses / count, dhidden, dweight, dbias), all but dhidden in float32 or wider.

    weight          [V, C]  in hidden's dtype
    bias            [V]     in hidden's dtype, to be added by the matrix product; None = cross_entropy_ adds it
    cross_entropy_  (logits, rows, losses, need_dlogits, need_bias) -> sum of dlogits over the rows: fills losses and puts dlogits in
                    the place of logits; `rows` is the slice of all rows that the chunk is
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    need_dlogits = need_hidden or need_weight or need_bias
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    allocate = torch.empty if hidden.shape[0] else torch.zeros  # the first chunk writes all of it
    dweight = allocate(weight.shape if need_weight else 0, dtype=wide, device=weight.device)
    dbias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=wide)
    # Autocast would change the products' dtype behind the caller's back: it is hidden's.
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in logits_by_chunk(hidden, weight, bias, most_bytes, multiple):
            column_sums = cross_entropy_(logits, rows, losses[rows], need_dlogits, need_bias)
            dlogits = logits
            if need_hidden:
                torch.mm(dlogits, weight, out=dhidden[rows])
            if need_weight:
                _add_product(dweight, dlogits, hidden[rows], first=rows.start == 0)
            if column_sums is not None:
                dbias += column_sums
    return (losses.sum(dtype=torch.float64) / count).to(wide), dhidden, dweight, dbias


def _add_product(total: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """total = dlogits^T hidden + (0 if first else total).

    total is float32 or wider, so that chunks do not drift: what is added is a product of float32 accumulators, rounded to hidden's
    dtype once at most.
    """
    beta = int(not first)
    if total.dtype == hidden.dtype:
        torch.addmm(total, dlogits.t(), hidden, beta=beta, out=total)
    elif hidden.device.type != "cpu" and _adds_in_float32():
        torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        words = total.shape[0]
        if hidden.device.type != "cpu":
            words = max(1, PRODUCT_BYTES // (hidden.shape[1] * hidden.element_size()))
        for part, columns in zip(total.split(words), dlogits.split(words, 1), strict=True):
            (part.copy_ if first else part.add_)(columns.t() @ hidden)


def _adds_in_float32() -> bool:
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= FLOAT32_SUMS_FROM
