"""AdamW and the global norm in plain PyTorch. Arithmetic is in float32, in float64 for float64 weights; nothing waits for the device."""

import torch
from torch import Tensor


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
    norm, scale, found_inf = scalars
    lr, beta1, beta2, eps, weight_decay, max_norm = numbers
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    one = weights[0].new_ones((), dtype=wide)
    scale = one if scale is None else scale.to(wide)
    norm = one * 0 if norm is None else norm.to(wide) * scale
    skip = ~torch.isfinite(norm)
    if found_inf is not None:
        skip |= ~(found_inf == 0)
    if skipped is not None:
        skipped[0] += skip
        skipped[1] = torch.where(skip, skipped[1] + 1, 0)
    factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else scale

    for i in range(len(weights)):
        steps[i] += ~skip
        rows = steps[i].numel()
        shape = (rows, weights[i].numel() // max(1, rows))
        tensors = (t.reshape(shape) for t in (weights[i], grads[i], exp_avg[i], exp_avg_sq[i]))
        copy = copies[i].view(shape) if copies else [None] * rows
        for w, g, m, v, t, c in zip(*tensors, steps[i].view(rows).double(), copy, strict=True):
            gradient = g.to(wide) * factor
            mean = m.to(wide) * beta1 + gradient * (1 - beta1)
            square = v.to(wide) * beta2 + gradient.square() * (1 - beta2)
            step_size, root = (lr / (1 - beta1**t)).to(wide), (1 - beta2**t).rsqrt().to(wide)
            kept = w.to(wide)
            kept = torch.cat([kept[: decay[i]] * (1 - lr * weight_decay), kept[decay[i] :]])
            weight = kept - mean * step_size / (square.sqrt() * root + eps)
            for old, new in ((w, weight), (m, mean), (v, square)):
                old.copy_(torch.where(skip, old, new.to(old.dtype)))
            if c is not None:
                c.copy_(torch.where(skip, c, weight.to(c.dtype)))


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Sums in float64, as the other implementations do beyond a few hundred elements."""
    total = torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()
    return total.to(torch.promote_types(tensors[0].dtype, torch.float32))
