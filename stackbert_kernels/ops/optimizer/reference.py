"""AdamW, LAMB, LANS and the global norm in plain PyTorch. Arithmetic is in float32, in float64 for float64 weights; nothing waits for the device."""

import torch
from torch import Tensor

from stackbert_kernels.ops.optimizer import segments


def _decided(
    like: Tensor, skipped: Tensor | None, scalars: list[Tensor | None], max_norm: float
) -> tuple[Tensor, Tensor]:
    """Whether the step is skipped, which is counted, and what gradients are multiplied with."""
    norm, scale, found_inf = scalars
    wide = torch.promote_types(like.dtype, torch.float32)
    one = like.new_ones((), dtype=wide)
    scale = one if scale is None else scale.to(wide)
    norm = one * 0 if norm is None else norm.to(wide) * scale
    skip = ~torch.isfinite(norm)
    if found_inf is not None:
        skip |= ~(found_inf == 0)
    if skipped is not None:
        skipped[0] += skip
        skipped[1] = torch.where(skip, skipped[1] + 1, 0)
    return skip, scale * (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else scale


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
    lr, beta1, beta2, eps, weight_decay, max_norm = numbers
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    skip, factor = _decided(weights[0], skipped, scalars, max_norm)
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


def lamb_(*arguments) -> None:
    _layerwise("lamb_", *arguments)


def lans_(*arguments) -> None:
    _layerwise("lans_", *arguments)


def _layerwise(
    op: str,
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    skipped: Tensor | None,
    decay: list[int],
    parts: list[int],
    scalars: list[Tensor | None],
    numbers: list[float],
) -> None:
    lr, beta1, beta2, eps, weight_decay, max_norm = numbers
    lans = op == "lans_"
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    skip, factor = _decided(weights[0], skipped, scalars, max_norm)
    for i, sizes in enumerate(segments.parts_of(op, weights, steps, parts)):
        steps[i] += ~skip
        tensors = [t.reshape(steps[i].numel(), sum(sizes)) for t in (weights[i], grads[i], exp_avg[i], exp_avg_sq[i])]
        copy = copies[i].view(steps[i].numel(), sum(sizes)) if copies else None
        for row, t in enumerate(steps[i].view(-1).double().unbind()):
            correction1, correction2 = (1 - beta1**t).to(wide), (1 - beta2**t).to(wide)
            end = 0
            for size in sizes:
                at, end = slice(end, end + size), end + size
                adapted = at.start < decay[i]
                w, g, m, v = (t[row, at] for t in tensors)
                gradient, before = g.to(wide) * factor, w.to(wide)
                if lans:
                    length = _length(gradient)
                    gradient = gradient / torch.where(length > 0, length + eps, 1.0).to(wide)
                mean = m.to(wide) * beta1 + gradient * (1 - beta1)
                square = v.to(wide) * beta2 + gradient.square() * (1 - beta2)
                down = (square / correction2).sqrt() + eps
                decayed = before * (weight_decay if adapted else 0.0)
                r = mean / correction1 / down + decayed
                change = _ratio(before, r, adapted) * r
                if lans:
                    c = gradient / down + decayed
                    change = beta1 * change + (1 - beta1) * _ratio(before, c, adapted) * c
                weight = before - lr * change
                for old, new in ((w, weight), (m, mean), (v, square)):
                    old.copy_(torch.where(skip, old, new.to(old.dtype)))
                if copy is not None:
                    copy[row, at] = torch.where(skip, copy[row, at], weight.to(copy.dtype))


def _length(x: Tensor) -> Tensor:
    return x.double().square().sum().sqrt()


def _ratio(weight: Tensor, term: Tensor, adapted: bool) -> Tensor | float:
    """The trust ratio."""
    if not adapted:
        return 1.0
    lengths = _length(weight), _length(term)
    return torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0).to(term.dtype)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Sums in float64, as the other implementations do beyond a few hundred elements."""
    total = torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()
    return total.to(torch.promote_types(tensors[0].dtype, torch.float32))
