"""The walk over chunks as implementations for a GPU take it: rows of logits that begin on 16 bytes, and a host that never waits.

The vocabulary is padded where it is no multiple of 16. Ignored rows stay in, with weight 0: leaving them out would take the host waiting
for the GPU.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stackbert_kernels.ops.masked_lm_loss import chunks

# Bytes. A call keeps below 256 MB beyond its inputs and gradients: what is left of MEMORY goes to the logits of a chunk, as each chunk
# more reads and writes the float32 sums of the gradients of weight and bias once more.
MEMORY = 253_000_000
LEAST_LOGITS = 64 << 20
ROWS_MULTIPLE = 128  # of a chunk: whole tiles of a matrix product
WORDS_MULTIPLE = (
    64  # a vocabulary that is no multiple of 16 is padded to one of this: rows of logits that begin on 16 bytes
)


class CrossEntropy(Protocol):
    """The cross entropy of a call's chunks. `rows` is the slice of all rows that the chunk is."""

    def __init__(self, labels: Tensor, words: int, ignore_index: int, count: Tensor): ...

    def __call__(
        self, logits: Tensor, rows: slice, losses: Tensor, need_dlogits: bool, need_bias: bool
    ) -> Tensor | None:
        """As chunks.forward wants it."""

    def rows_of_sums(self, hidden: Tensor, vocabulary: int) -> int:
        """How many rows of column sums are kept until the end, at most."""

    def dbias(self) -> Tensor | None:
        """The column sums of all chunks that the calls did not return; None if there are none such."""

    def predictions(self, logits: Tensor, rows: slice, losses: Tensor, correct: Tensor) -> None: ...


def _padded(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in dtype, and with words of weight 0 and bias -inf behind them where the vocabulary is no multiple of 16."""
    words, columns = weight.shape
    if words % 16 == 0:
        return weight.to(dtype), bias.to(dtype)
    padded = -(-words // WORDS_MULTIPLE) * WORDS_MULTIPLE
    matrix, shifts = weight.new_empty(padded, columns, dtype=dtype), bias.new_empty(padded, dtype=dtype)
    matrix[:words], matrix[words:] = weight, 0
    shifts[:words], shifts[words:] = bias, -torch.inf
    return matrix, shifts


def _logits_bytes(hidden: Tensor, weight: Tensor, matrix: Tensor, need_weight: bool, rows_of_sums: int) -> int:
    """Of a chunk. hidden is a copy (without what ignored rows hold), matrix may be one."""
    left = MEMORY - hidden.nbytes
    if matrix is not weight:
        left -= matrix.nbytes
    if need_weight and weight.dtype != torch.float32:
        left -= 4 * matrix.numel()
    return max(left - 4 * matrix.shape[0] * rows_of_sums, LEAST_LOGITS)


def masked_lm_loss_fwd(
    implementation: type[CrossEntropy],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    words = weight.shape[0]
    hidden, _, count = chunks.without_ignored(hidden, labels, words, ignore_index)
    matrix, shifts = _padded(weight, bias, hidden.dtype)
    cross_entropy = implementation(labels.contiguous(), words, ignore_index, count)
    rows_of_sums = cross_entropy.rows_of_sums(hidden, matrix.shape[0]) if need_bias else 0
    loss, dhidden, dweight, dbias = chunks.forward(
        hidden,
        matrix,
        shifts,
        count,
        need_hidden,
        need_weight,
        need_bias,
        cross_entropy,
        _logits_bytes(hidden, weight, matrix, need_weight, rows_of_sums),
        ROWS_MULTIPLE,
    )
    kept = cross_entropy.dbias()
    if kept is not None:
        dbias = kept
    return loss, dhidden, dweight[:words].to(weight.dtype), dbias[:words].to(bias.dtype)


def masked_lm_predictions(
    implementation: type[CrossEntropy], hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    words = weight.shape[0]
    hidden, valid, count = chunks.without_ignored(hidden, labels, words, ignore_index)
    losses, correct = hidden.new_empty(labels.shape, dtype=torch.float32), torch.empty_like(valid)
    cross_entropy = implementation(labels.contiguous(), words, ignore_index, count)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix, shifts = _padded(weight, bias, hidden.dtype)
        for rows, logits in chunks.logits_by_chunk(hidden, matrix, shifts, LEAST_LOGITS, ROWS_MULTIPLE):
            cross_entropy.predictions(logits, rows, losses[rows], correct[rows])
    return losses.sum(dtype=torch.float64), correct.sum(), valid.sum()
