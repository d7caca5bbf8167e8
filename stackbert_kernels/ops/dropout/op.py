"""dropout: where BERT needs it outside the fused ops, as before a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops import philox
from stackbert_kernels.ops.dropout import native, reference

triton = library.lazy("stackbert_kernels.ops.dropout.triton_kernel", "dropout")

TABLE = {
    "cpu": {"reference": reference.dropout, "native": native.dropout, "triton": triton},
    "cuda": {"reference": reference.dropout, "native": native.dropout_cuda, "triton": triton},
}


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"dropout: x must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"dropout: x must be [rows, columns], got {list(x.shape)}")


def _fake(x: Tensor, rng: Tensor, site: int, threshold: int, impl: str) -> Tensor:
    _check(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


OP = library.Op("dropout", TABLE, library.only_dtypes)
_dropout = library.define("dropout(Tensor x, Tensor rng, int site, int threshold, str impl) -> Tensor", TABLE, _fake)


def _setup(ctx, inputs, output):
    _, rng, ctx.site, ctx.threshold, ctx.impl = inputs
    ctx.save_for_backward(rng)


def _backward(ctx, dy: Tensor):
    (rng,) = ctx.saved_tensors
    return _dropout(dy, rng, ctx.site, ctx.threshold, ctx.impl), None, None, None, None


library.autograd("dropout", _setup, _backward)


def dropout(x: Tensor, p: float, *, rng: Tensor | None = None, site: int = 0, impl: str = "auto") -> Tensor:
    """Zeroes each element with probability round(256 p) / 256 and scales the others by the realised keep rate.

        x        [..., C]  any floating dtype
        rng      [2] int64 (seed, step) on x's device, from new_rng; None = drawn from torch's generator
        site     an integer unique to the place in the model
        returns  [..., C]

    The mask is a pure function of (seed, step, site, row, column); the backward pass draws it again. p = 0 returns x itself.

    Before:
        y = F.dropout(x, p)
    After:
        y = sbk.ops.dropout(x, p)
    """
    threshold, rng = philox.dropout_arguments("dropout", p, rng, site, x.device)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x
    _check(rows)
    impl = OP.resolve(impl, rows)
    if threshold == 0:
        return x
    return _dropout(rows, rng, site, threshold, impl).reshape(x.shape)
