"""Attention in plain PyTorch: every sequence padded to the longest, in float32 or wider. Reads nothing on the host.

Legend: B sequences, S longest, T tokens, H heads, D head dimension. x is packed [T, H, D], with seqlens = cu_seqlens [B + 1], or padded
[B, S, H, D], with seqlens = lengths [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops import philox


def forward(q, k, v, seqlens, max_seqlen, scale, rng, site, threshold, with_lse) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(lse_shape(q) if with_lse else (0,), dtype=wide)
    if q.numel() == 0 or max_seqlen == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse.zero_()
    layout = _Layout(q, seqlens, max_seqlen)
    q_, k_, v_ = (layout.pad(x) for x in (q, k, v))
    scores = layout.scores(q_, k_, scale)
    row_lse = torch.where(layout.inside[:, None], torch.logsumexp(scores, -1), 0.0)  # [B, H, S]
    p = layout.probabilities(scores, row_lse)
    out = layout.unpad(_dropped(p, rng, site, threshold) @ v_).to(q.dtype)
    if with_lse:
        lse = layout.unpad(row_lse[..., None]).squeeze(-1).transpose(-1, -2).contiguous()
    return out, lse


def backward(
    dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or max_seqlen == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    layout = _Layout(q, seqlens, max_seqlen)
    q_, k_, v_, out_, dout_ = (layout.pad(x) for x in (q, k, v, out, dout))
    row_lse = layout.pad(lse.transpose(-1, -2)[..., None]).squeeze(-1)
    p = layout.probabilities(layout.scores(q_, k_, scale), row_lse)
    dv = _dropped(p, rng, site, threshold).transpose(-1, -2) @ dout_
    dp = _dropped(dout_ @ v_.transpose(-1, -2), rng, site, threshold)
    delta = (out_ * dout_).sum(-1, keepdim=True)  # = rowsum(p * dp)
    ds = p * (dp - delta) * scale
    dq, dk = ds @ k_, ds.transpose(-1, -2) @ q_
    return tuple(layout.unpad(dx).to(q.dtype) for dx in (dq, dk, dv))


def qkv_forward(qkv, *arguments) -> tuple[Tensor, Tensor]:
    return forward(*qkv.unbind(1), *arguments)


def qkv_backward(dout, qkv, *arguments) -> Tensor:
    return torch.stack(backward(dout, *qkv.unbind(1), *arguments), 1)


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """[H, T] of packed, [B, H, S] of padded queries."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


class _Layout:
    """Where each token stands in the [B, S] rectangle."""

    def __init__(self, q: Tensor, seqlens: Tensor, max_seqlen: int):
        self.packed = q.dim() == 3
        position = torch.arange(max_seqlen, device=q.device)
        if self.packed:
            start, end = seqlens[:-1].long(), seqlens[1:].long()
            self.inside = position < (end - start)[:, None]  # [B, S]
            self.token = (start[:, None] + position).clamp(max=q.shape[0] - 1)  # [B, S]
            token = torch.arange(q.shape[0], device=q.device)
            self.sequence = torch.searchsorted(end, token, right=True)  # [T]
            self.position = token - start[self.sequence]
        else:
            self.inside = position < seqlens[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] or [B, S, H, D] to [B, H, S, D]; zeros, whatever stands there, where no token is."""
        x = (x[self.token] if self.packed else x).to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(self.inside[..., None, None], x, 0.0).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x[self.sequence, self.position] if self.packed else x.contiguous()

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        scores = q @ k.transpose(-1, -2) * scale
        return scores.masked_fill(~self.inside[:, None, None, :], float("-inf"))

    def probabilities(self, scores: Tensor, lse: Tensor) -> Tensor:
        both = self.inside[:, None, :, None] & self.inside[:, None, None, :]
        return torch.where(both, torch.exp(scores - lse[..., None]), 0.0)


def _dropped(x: Tensor, rng: Tensor, site: int, threshold: int) -> Tensor:
    """x [B, H, S, S] times the dropout factors."""
    if threshold == 0:
        return x
    kept = [philox.attention_bytes(rng, site, b, *x.shape[1:]) >= threshold for b in range(x.shape[0])]
    return torch.where(torch.stack(kept), x * philox.scale(threshold), 0.0)
