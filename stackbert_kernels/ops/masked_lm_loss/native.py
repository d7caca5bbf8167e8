"""Masked-LM loss with the cross entropy by csrc/masked_lm_loss. Ignored rows are left out before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C, NATIVE_DTYPES
from stackbert_kernels.ops.masked_lm_loss import chunks


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
