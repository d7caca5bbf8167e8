"""Layer norm, alone and at the end of a residual branch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stackbert_kernels import ops


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by the op layer_norm; arguments, defaults (eps is 1e-5) and state dict are those of nn.LayerNorm.

        x        [..., *normalized_shape]  any floating dtype; the parameters have the same or float32
        returns  like x, in x's dtype, under autocast too; statistics are float32 (float64 for float64)

    Before:
        norm = nn.LayerNorm(C)
        y = norm(x)
    After:
        norm = sbk.nn.LayerNorm(C)
        y = norm(x)
    """

    impl = "auto"

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        rows = _rows(self, x)
        y = ops.layer_norm(rows, *affine(self, rows), self.eps, impl=self.impl)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        return super().extra_repr() + _unless_auto(self.impl)


class DropoutAddLayerNorm(nn.LayerNorm):
    """norm(residual + dropout(x)), the end of both halves of a post-LN layer, as one pass; the state dict is that of the nn.LayerNorm.

        x         [..., *normalized_shape]  what the branch made; any floating dtype, the parameters have the same or float32
        residual  like x                    what went into the branch
        x_bias    normalized_shape          of the linear layer that made x, where that left it out; None = nothing to add
        rng       [2] int64                 (seed, step) from ops.new_rng; None = drawn from torch's generator in each call
        returns   like x; dropout in training only

    With an rng of your own, `site` must be unique to the place in the model; without one each call has masks of its own.

    Before:
        norm, dropout = nn.LayerNorm(C), nn.Dropout(p)
        y = norm(residual + dropout(x))
    After:
        norm = sbk.nn.DropoutAddLayerNorm(C, p)
        y = norm(x, residual)
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        p: float = 0.1,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        site: int = 0,
        impl: str = "auto",
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.p, self.site, self.impl = checked_p("DropoutAddLayerNorm", p), site, impl

    def forward(
        self, x: Tensor, residual: Tensor, x_bias: Tensor | None = None, *, rng: Tensor | None = None
    ) -> Tensor:
        if residual.shape != x.shape:
            raise ValueError(
                f"DropoutAddLayerNorm: residual must have x's shape {list(x.shape)}, got {list(residual.shape)}"
            )
        rows = _rows(self, x)
        y = ops.dropout_add_layer_norm(
            rows,
            residual.reshape(rows.shape),
            *affine(self, rows),
            x_bias=None if x_bias is None else x_bias.reshape(-1),
            dropout_p=self.p if self.training else 0.0,
            rng=rng,
            site=self.site,
            eps=self.eps,
            impl=self.impl,
        )
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}" + _unless_auto(self.impl)


def affine(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias [C] of a norm of x [..., C]; ones and zeros for what it does not have."""
    weight = x.new_ones(x.shape[-1]) if norm.weight is None else norm.weight.reshape(-1)
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.reshape(-1)
    return weight, bias


def checked_p(module: str, p: float) -> float:
    if not 0.0 <= p < 511 / 512:
        raise ValueError(f"{module}: dropout must be in [0, 0.998), got {p}")
    return p


def _rows(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """[..., *normalized_shape] -> [..., C]"""
    shape = tuple(norm.normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{type(norm).__name__}: x must be [..., {', '.join(map(str, shape))}], got {list(x.shape)}")
    return x if len(shape) == 1 else x.reshape(*x.shape[: -len(shape)], math.prod(shape))


def _unless_auto(impl: str) -> str:
    return "" if impl == "auto" else f", impl={impl!r}"
