"""bias_gelu: gelu(x + bias), between the two matrix products of a feed-forward layer. R rows, C columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops.gelu import native, reference

APPROXIMATE = ("none", "tanh")


def _check(x: Tensor, bias: Tensor, approximate: str) -> None:
    if approximate not in APPROXIMATE:
        raise ValueError(f"bias_gelu: approximate must be one of {', '.join(APPROXIMATE)}, got {approximate!r}")
    if not x.is_floating_point():
        raise TypeError(f"bias_gelu: x must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"bias_gelu: x must be [rows, columns], got {list(x.shape)}")
    if bias.shape != x.shape[1:]:
        raise ValueError(f"bias_gelu: bias must be [{x.shape[1]}] to match x, got {list(bias.shape)}")
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"bias_gelu: bias must be float32 or x's {x.dtype}, got {bias.dtype}")
    if bias.device != x.device:
        raise ValueError(f"bias_gelu: bias must be on x's device {x.device}, got {bias.device}")


def _fwd_fake(x, bias, approximate, impl):
    _check(x, bias, approximate)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bwd_fake(dy, x, bias, approximate, impl):
    _check(x, bias, approximate)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(f"bias_gelu: dy must be {x.dtype} {list(x.shape)} as x, got {dy.dtype} {list(dy.shape)}")
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


TRITON = "stackbert_kernels.ops.gelu.triton_kernel"
triton_fwd, triton_bwd = library.lazy(TRITON, "bias_gelu_fwd"), library.lazy(TRITON, "bias_gelu_bwd")

FORWARD = {
    "cpu": {"reference": reference.bias_gelu_fwd, "native": native.bias_gelu_fwd, "triton": triton_fwd},
    "cuda": {"reference": reference.bias_gelu_fwd, "native": native.bias_gelu_fwd_cuda, "triton": triton_fwd},
}
BACKWARD = {
    "cpu": {"reference": reference.bias_gelu_bwd, "native": native.bias_gelu_bwd, "triton": triton_bwd},
    "cuda": {"reference": reference.bias_gelu_bwd, "native": native.bias_gelu_bwd_cuda, "triton": triton_bwd},
}

OP = library.Op("bias_gelu", FORWARD, library.only_dtypes)
_bias_gelu_fwd = library.define(
    "bias_gelu_fwd(Tensor x, Tensor bias, str approximate, str impl) -> Tensor", FORWARD, _fwd_fake
)
_bias_gelu_bwd = library.define(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias, str approximate, str impl) -> (Tensor dx, Tensor dbias)",
    BACKWARD,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    x, bias, ctx.approximate, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy: Tensor):
    return *_bias_gelu_bwd(dy, *ctx.saved_tensors, ctx.approximate, ctx.impl), None, None


library.autograd("bias_gelu_fwd", _setup, _backward)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none", impl: str = "auto") -> Tensor:
    """gelu(x + bias) (Hendrycks & Gimpel 2016).

        x            [..., C]  any floating dtype
        bias         [C]       float32 or x's dtype
        approximate  "none" = u * Phi(u) by the error function; "tanh" = 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))
        returns      [..., C]  in x's dtype; computed in float32 (float64 for float64)

    Saves x and bias for backward, nothing else. The gradient of bias does not depend on the thread count.

    Before:
        y = F.gelu(F.linear(h, dense, bias))
    After:
        y = sbk.ops.bias_gelu(F.linear(h, dense), bias)
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else x
    _check(rows, bias, approximate)
    impl = OP.resolve(impl, rows)
    return _bias_gelu_fwd(rows, bias, approximate, impl).reshape(x.shape)
