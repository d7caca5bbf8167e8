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
    hidden, valid, count = chunks.without_ignored(hidden, labels, weight.shape[0], ignore_index)
    target = labels.masked_fill(~valid, 0)
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def cross_entropy_(
        logits: Tensor, rows: slice, losses: Tensor, need_dlogits: bool, need_bias: bool
    ) -> Tensor | None:
        labels, keep = target[rows, None], valid[rows, None]
        log_p = (logits.to(wide) + bias.to(wide)).log_softmax(-1)
        losses.copy_(torch.where(keep, -log_p.gather(1, labels), 0.0)[:, 0])
        if not need_dlogits:
            return None
        dlogits = log_p.exp_()
        dlogits.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=wide))
        dlogits.mul_(keep / count)
        logits.copy_(dlogits)
        return dlogits.sum(0) if need_bias else None

    loss, dhidden, dweight, dbias = chunks.forward(
        hidden, weight.to(hidden.dtype), None, count, need_hidden, need_weight, need_bias, cross_entropy_
    )
    return loss, dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)


def masked_lm_predictions(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, valid, _ = chunks.without_ignored(hidden, labels, weight.shape[0], ignore_index)
    target = labels.masked_fill(~valid, 0)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, correct = hidden.new_zeros((), dtype=torch.float64), labels.new_zeros(())
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in chunks.logits_by_chunk(hidden, weight.to(hidden.dtype)):
            logits = logits.to(wide) + bias.to(wide)
            losses = -logits.log_softmax(-1).gather(1, target[rows, None])[:, 0]
            loss += torch.where(valid[rows], losses, 0.0).sum(dtype=torch.float64)
            correct += ((logits.argmax(-1) == target[rows]) & valid[rows]).sum()
    return loss, correct, valid.sum()
