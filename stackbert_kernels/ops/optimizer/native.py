"""AdamW by csrc/optimizer."""

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    skipped: Tensor | None,
    decay: list[int],
    scalars: list[Tensor | None],
    numbers: list[float],
) -> None:
    grads = [g.contiguous() for g in grads]
    tensors = zip(weights, grads, exp_avg, exp_avg_sq, steps, copies or [None] * len(weights), decay, strict=True)
    scalars = [None if s is None else s.float() for s in scalars]
    _C.adamw(
        regions=[
            (
                w.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), t.data_ptr(), 0 if c is None else c.data_ptr(),
                t.numel(), w.numel() // max(1, t.numel()), d,
            )
            for w, g, m, v, t, c, d in tensors
        ],
        **dict(zip(("norm", "scale", "found_inf"), (0 if s is None else s.data_ptr() for s in scalars), strict=True)),
        **dict(zip(("lr", "beta1", "beta2", "eps", "weight_decay", "max_norm"), numbers, strict=True)),
        skipped=0 if skipped is None else skipped.data_ptr(),
        threads=torch.get_num_threads(),
    )  # fmt: skip
