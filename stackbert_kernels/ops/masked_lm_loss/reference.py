"""Masked-LM loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

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
    hidden, target, valid = _without_ignored(hidden, weight, labels, ignore_index)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = valid.sum().clamp(min=1).to(wide)  # a tensor: the host need not wait for a GPU to count

    def cross_entropy_(
        logits: Tensor, rows: slice, need_dlogits: bool, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        labels, keep = target[rows, None], valid[rows, None]
        log_p = (logits.to(wide) + bias.to(wide)).log_softmax(-1)
        losses = torch.where(keep, -log_p.gather(1, labels), 0.0)
        if not need_dlogits:
            return losses, None
        dlogits = log_p.exp_()
        dlogits.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=wide))
        dlogits.mul_(keep / count)
        logits.copy_(dlogits)
        return losses, dlogits.sum(0) if need_bias else None

    return chunks.forward(hidden, weight, bias, count, need_hidden, need_weight, need_bias, cross_entropy_)


def masked_lm_predictions(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, target, valid = _without_ignored(hidden, weight, labels, ignore_index)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, correct = hidden.new_zeros((), dtype=torch.float64), labels.new_zeros(())
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in chunks.logits_by_chunk(hidden, weight.to(hidden.dtype)):
            logits = logits.to(wide) + bias.to(wide)
            losses = -logits.log_softmax(-1).gather(1, target[rows, None])[:, 0]
            loss += torch.where(valid[rows], losses, 0.0).sum(dtype=torch.float64)
            correct += ((logits.argmax(-1) == target[rows]) & valid[rows]).sum()
    return loss, correct, valid.sum()


def _without_ignored(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden with zeros in the ignored rows, labels with 0 there, and where they are not."""
    valid = labels != ignore_index
    if labels.device.type == "cpu":
        chunks.check_labels(labels[valid], weight.shape[0])
    return hidden.masked_fill(~valid[:, None], 0), labels.masked_fill(~valid, 0), valid
