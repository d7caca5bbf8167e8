"""Masked-LM loss with the cross entropy by csrc/masked_lm_loss.

On the CPU ignored rows are left out before anything is computed; `_cuda` leaves them in, where the host would wait for their number.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES
from stackbert_kernels.ops.masked_lm_loss import chunks, padded


def masked_lm_loss_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept, hidden_kept, labels = _without_ignored(hidden, weight, labels, ignore_index)
    count = max(1, labels.shape[0])
    bias32 = bias.to(torch.float32).contiguous()

    def cross_entropy_(
        logits: Tensor, rows: slice, losses: Tensor, need_dlogits: bool, need_bias: bool
    ) -> Tensor | None:
        parts = None
        if need_bias:
            parts = torch.empty(-(-logits.shape[0] // _C.CROSS_ENTROPY_ROWS), logits.shape[1])
        _cross_entropy(logits, bias32, labels[rows], losses, parts, None, need_dlogits, 1 / count)
        return None if parts is None else parts.sum(0)

    loss, dhidden, dweight, dbias = chunks.forward(
        hidden_kept, weight.to(hidden.dtype), None, count, need_hidden, need_weight, need_bias, cross_entropy_
    )
    if need_hidden and kept is not None:
        dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype).index_copy_(0, kept, dhidden)
    return loss, dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)


def masked_lm_predictions(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    _, hidden, labels = _without_ignored(hidden, weight, labels, ignore_index)
    bias32 = bias.to(torch.float32).contiguous()
    losses, correct = torch.empty(labels.shape), torch.empty(labels.shape, dtype=torch.bool)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in chunks.logits_by_chunk(hidden, weight.to(hidden.dtype)):
            _cross_entropy(logits, bias32, labels[rows], losses[rows], None, correct[rows], False, 1.0)
    return losses.sum(dtype=torch.float64), correct.sum(), torch.tensor(labels.shape[0])


def _without_ignored(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The numbers of the rows that count (None: all of them), their hidden and their labels."""
    kept = (labels != ignore_index).nonzero()[:, 0]
    if kept.shape == labels.shape:
        kept, labels = None, labels.contiguous()
    else:
        hidden, labels = hidden[kept], labels[kept]
    chunks.check_labels(labels, weight.shape[0])
    return kept, hidden, labels


def _cross_entropy(
    logits: Tensor,
    bias: Tensor,
    labels: Tensor,
    losses: Tensor,
    bias_parts: Tensor | None,
    correct: Tensor | None,
    gradient: bool,
    scale: float,
) -> None:
    _C.cross_entropy(
        logits.data_ptr(),
        bias.data_ptr(),
        labels.data_ptr(),
        losses.data_ptr(),
        0 if bias_parts is None else bias_parts.data_ptr(),
        0 if correct is None else correct.data_ptr(),
        *logits.shape,
        NATIVE_DTYPES[logits.dtype],
        gradient,
        scale,
        torch.get_num_threads(),
    )


class _CudaCrossEntropy:
    """The kernels of csrc/masked_lm_loss for the chunks of a call."""

    def __init__(self, labels: Tensor, words: int, ignore_index: int, count: Tensor):
        self.labels, self.words, self.ignore_index, self.count = labels, words, ignore_index, count
        self.blocks: int | None = None  # that take turns at the rows of a chunk
        self.sums: Tensor | None = None  # [blocks, V] of the gradient over the rows that each block had, in all chunks

    def __call__(
        self, logits: Tensor, rows: slice, losses: Tensor, need_dlogits: bool, need_bias: bool
    ) -> Tensor | None:
        if self.blocks is None:
            self.blocks = self.rows_of_sums(logits, logits.shape[1]) if need_dlogits else 0
        first = self.sums is None
        if first and need_bias and self.blocks:
            self.sums = logits.new_empty(self.blocks, logits.shape[1], dtype=torch.float32)
        self._launch(logits, rows, losses, None, need_dlogits, self.blocks, add=not first)
        return logits.sum(0, dtype=torch.float32) if need_bias and self.sums is None else None

    def rows_of_sums(self, x: Tensor, vocabulary: int) -> int:
        dtype = NATIVE_DTYPES[x.dtype]
        return library.ask("cross_entropy_blocks_cuda", x, rows=len(x), vocabulary=vocabulary, dtype=dtype)

    def dbias(self) -> Tensor | None:
        return None if self.sums is None else self.sums.sum(0)

    def predictions(self, logits: Tensor, rows: slice, losses: Tensor, correct: Tensor) -> None:
        self._launch(logits, rows, losses, correct, False, 0, add=False)

    def _launch(
        self,
        logits: Tensor,
        rows: slice,
        losses: Tensor,
        correct: Tensor | None,
        gradient: bool,
        blocks: int,
        *,
        add: bool,
    ) -> None:
        library.launch(
            "cross_entropy_cuda",
            logits,
            logits=logits.data_ptr(),
            labels=self.labels[rows].data_ptr(),
            count=self.count.data_ptr(),
            losses=losses.data_ptr(),
            correct=0 if correct is None else correct.data_ptr(),
            sums=0 if self.sums is None else self.sums.data_ptr(),
            rows=logits.shape[0],
            vocabulary=logits.shape[1],
            words=self.words,
            ignore_index=self.ignore_index,
            blocks=blocks,
            dtype=NATIVE_DTYPES[logits.dtype],
            gradient=gradient,
            add=add,
        )


masked_lm_loss_fwd_cuda = partial(padded.masked_lm_loss_fwd, _CudaCrossEntropy)
masked_lm_predictions_cuda = partial(padded.masked_lm_predictions, _CudaCrossEntropy)
