"""Layer norm, alone and behind BERT's dropout and residual, in plain PyTorch. R rows, C columns.

Everything is computed in float32, in float64 for float64 tensors, and rounded once at the end.
"""

import torch
from torch import Tensor

from stackbert_kernels.ops import philox


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = z.mean(1, keepdim=True)
    variance = (
        (z - mean).square().mean(1, keepdim=True)
    )  # two passes: E[z^2] - mean^2 loses its digits when |mean| >> std
    return mean, (variance + eps).rsqrt()


def _dropped(x: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int) -> Tensor:
    """dropout(x + x_bias)"""
    h = x.to(_wide(x.dtype))
    if x_bias is not None:
        h = h + x_bias
    return h * philox.row_factors(rng, site, threshold, h) if threshold else h


def _norm_bwd(dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dweight, dbias in the wide dtype."""
    dy = dy.to(z.dtype)
    normed = (z - mean[:, None]) * rstd[:, None]
    g = dy * weight
    dz = rstd[:, None] * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))
    return dz, (dy * normed).sum(0), dy.sum(0)


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    z = x.contiguous().to(_wide(x.dtype))
    mean, rstd = _statistics(z, eps)
    return ((z - mean) * rstd * weight + bias).to(x.dtype), mean.squeeze(1), rstd.squeeze(1)


def layer_norm_forward_only(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm_fwd(x, weight, bias, eps)[0]


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _norm_bwd(dy, x.contiguous().to(_wide(x.dtype)), weight, mean, rstd)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    rng: Tensor,
    site: int,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    z = residual.contiguous() + _dropped(x.contiguous(), x_bias, rng, site, threshold)
    y, mean, rstd = layer_norm_fwd(z, weight, bias, eps)
    return y.to(x.dtype), mean, rstd


def dropout_add_layer_norm_forward_only(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    rng: Tensor,
    site: int,
    threshold: int,
    eps: float,
) -> Tensor:
    return dropout_add_layer_norm_fwd(x, residual, weight, bias, x_bias, rng, site, threshold, eps)[0]


def dropout_add_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor,
    site: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = residual.contiguous() + _dropped(x.contiguous(), x_bias, rng, site, threshold)
    dz, dweight, dbias = _norm_bwd(dy, z, weight, mean, rstd)
    dx, dx_bias = _dropped_bwd(dz, x.dtype, x_bias, rng, site, threshold)
    return dx, dz.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), dx_bias


def dropout_add_fwd(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int
) -> Tensor:
    return (residual.contiguous() + _dropped(x.contiguous(), x_bias, rng, site, threshold)).to(x.dtype)


def dropout_add_bwd(dy: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int) -> tuple[Tensor, Tensor]:
    return _dropped_bwd(dy.contiguous().to(_wide(dy.dtype)), dy.dtype, x_bias, rng, site, threshold)


def _dropped_bwd(
    dz: Tensor, dtype: torch.dtype, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """dx [R, C], which never shares memory with dz; dx_bias [C], or [0] where there is no x_bias."""
    dh = dz * philox.row_factors(rng, site, threshold, dz) if threshold else dz
    dx_bias = dz.new_empty(0) if x_bias is None else dh.sum(0).to(x_bias.dtype)
    return dh.to(dtype, copy=True), dx_bias
