"""layer_norm, dropout_add_layer_norm (BERT's LN(residual + dropout(x + bias))) and dropout_add (the same without the norm).

R rows, C columns. Each `*_fwd` has a `*_forward_only` twin, taken where nothing needs a gradient: it neither computes for
backward nor returns anything but y. Saved for backward are the inputs and two statistics a row; the sum that is normalised and the
dropout mask are computed again, which moves no more bytes than saving the sum would and keeps it exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops import philox
from stackbert_kernels.ops.layer_norm import native, reference

TRITON_COLUMNS = 8192  # a row and its gradients lie in the registers of one program
CUDA_COLUMNS = 8192  # csrc/layer_norm/layer_norm.h


def _check_x(op: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be [rows, columns] with columns > 0, got {list(x.shape)}")


def _check_parameter(op: str, name: str, parameter: Tensor | None, x: Tensor) -> None:
    if parameter is None:
        return
    if parameter.shape != x.shape[1:]:
        raise ValueError(f"{op}: {name} must be [{x.shape[1]}] to match x, got {list(parameter.shape)}")
    if parameter.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: {name} must be float32 or x's {x.dtype}, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {parameter.device}")


def _check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape:
        raise ValueError(f"{op}: {name} must have x's shape {list(x.shape)}, got {list(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
) -> None:
    _check_x(op, x)
    if residual is not None:
        _check_like(op, "residual", residual, x)
    for name, parameter in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        _check_parameter(op, name, parameter, x)
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else x


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _layer_norm_fwd_fake(x, weight, bias, eps, impl):
    _check("layer_norm", x, None, weight, bias, None, eps)
    return _dense_like(x), *_statistics_of(x)


def _layer_norm_forward_only_fake(x, weight, bias, eps, impl):
    _check("layer_norm", x, None, weight, bias, None, eps)
    return _dense_like(x)


def _layer_norm_bwd_fake(dy, x, weight, bias, mean, rstd, impl):
    _check_like("layer_norm", "dy", dy, x)
    return _dense_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _triton(function: str) -> Callable:
    return library.lazy("stackbert_kernels.ops.layer_norm.triton_kernel", function)


def _why_not(impl: str, x: Tensor) -> str | None:
    if impl == "triton" and x.shape[1] > TRITON_COLUMNS:
        return f"triton takes rows of at most {TRITON_COLUMNS} elements, got {x.shape[1]}"
    if impl == "native" and x.is_cuda and x.shape[1] > CUDA_COLUMNS:
        return f"native takes rows of at most {CUDA_COLUMNS} elements on a GPU, got {x.shape[1]}"
    return library.only_dtypes(impl, x)


FORWARD = {
    "cpu": {
        "reference": reference.layer_norm_fwd,
        "native": native.layer_norm_fwd,
        "triton": _triton("layer_norm_fwd"),
    },
    "cuda": {
        "reference": reference.layer_norm_fwd,
        "native": native.layer_norm_fwd_cuda,
        "triton": _triton("layer_norm_fwd"),
    },
}
FORWARD_ONLY = {
    "cpu": {
        "reference": reference.layer_norm_forward_only,
        "native": native.layer_norm_forward_only,
        "triton": _triton("layer_norm_forward_only"),
    },
    "cuda": {
        "reference": reference.layer_norm_forward_only,
        "native": native.layer_norm_forward_only_cuda,
        "triton": _triton("layer_norm_forward_only"),
    },
}
BACKWARD = {
    "cpu": {
        "reference": reference.layer_norm_bwd,
        "native": native.layer_norm_bwd,
        "triton": _triton("layer_norm_bwd"),
    },
    "cuda": {
        "reference": reference.layer_norm_bwd,
        "native": native.layer_norm_bwd_cuda,
        "triton": _triton("layer_norm_bwd"),
    },
}

LAYER_NORM = library.Op("layer_norm", FORWARD, _why_not)
_layer_norm_fwd = library.define(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps, str impl) -> (Tensor y, Tensor mean, Tensor rstd)",
    FORWARD,
    _layer_norm_fwd_fake,
)
_layer_norm_forward_only = library.define(
    "layer_norm_forward_only(Tensor x, Tensor weight, Tensor bias, float eps, str impl) -> Tensor",
    FORWARD_ONLY,
    _layer_norm_forward_only_fake,
)
_layer_norm_bwd = library.define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, str impl)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    BACKWARD,
    _layer_norm_bwd_fake,
)


def _layer_norm_setup(ctx, inputs, output):
    x, weight, bias, _, ctx.impl = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _layer_norm_backward(ctx, dy, dmean, drstd):
    if dy is None:
        return (None,) * 5
    return *_layer_norm_bwd(dy, *ctx.saved_tensors, ctx.impl), None, None


library.autograd("layer_norm_fwd", _layer_norm_setup, _layer_norm_backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12, *, impl: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016).

        x             [..., C]  any floating dtype
        weight, bias  [C]       float32 or x's dtype
        returns       [..., C]  in x's dtype; statistics are float32 (float64 for float64)

    The gradients of weight and bias are summed in float32, in an order that does not depend on the thread count.

    Before:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    After:
        y = sbk.ops.layer_norm(x, weight, bias, eps)
    """
    rows = _rows(x)
    _check("layer_norm", rows, None, weight, bias, None, eps)
    impl = LAYER_NORM.resolve(impl, rows)
    if _needs_grad(x, weight, bias):
        y, _, _ = _layer_norm_fwd(rows, weight, bias, eps, impl)
    else:
        y = _layer_norm_forward_only(rows, weight, bias, eps, impl)
    return y.reshape(x.shape)


def _dropout_add_layer_norm_fwd_fake(x, residual, weight, bias, x_bias, rng, site, threshold, eps, impl):
    _check("dropout_add_layer_norm", x, residual, weight, bias, x_bias, eps)
    return _dense_like(x), *_statistics_of(x)


def _dropout_add_layer_norm_forward_only_fake(x, residual, weight, bias, x_bias, rng, site, threshold, eps, impl):
    _check("dropout_add_layer_norm", x, residual, weight, bias, x_bias, eps)
    return _dense_like(x)


def _dx_bias_fake(dy, x_bias):
    return dy.new_empty(0) if x_bias is None else torch.empty_like(x_bias)


def _dropout_add_layer_norm_bwd_fake(dy, x, residual, weight, bias, x_bias, mean, rstd, rng, site, threshold, impl):
    _check_like("dropout_add_layer_norm", "dy", dy, x)
    return _dense_like(x), _dense_like(x), torch.empty_like(weight), torch.empty_like(bias), _dx_bias_fake(dy, x_bias)


ADD_NORM_FORWARD = {
    "cpu": {
        "reference": reference.dropout_add_layer_norm_fwd,
        "native": native.dropout_add_layer_norm_fwd,
        "triton": _triton("dropout_add_layer_norm_fwd"),
    },
    "cuda": {
        "reference": reference.dropout_add_layer_norm_fwd,
        "native": native.dropout_add_layer_norm_fwd_cuda,
        "triton": _triton("dropout_add_layer_norm_fwd"),
    },
}
ADD_NORM_FORWARD_ONLY = {
    "cpu": {
        "reference": reference.dropout_add_layer_norm_forward_only,
        "native": native.dropout_add_layer_norm_forward_only,
        "triton": _triton("dropout_add_layer_norm_forward_only"),
    },
    "cuda": {
        "reference": reference.dropout_add_layer_norm_forward_only,
        "native": native.dropout_add_layer_norm_forward_only_cuda,
        "triton": _triton("dropout_add_layer_norm_forward_only"),
    },
}
ADD_NORM_BACKWARD = {
    "cpu": {
        "reference": reference.dropout_add_layer_norm_bwd,
        "native": native.dropout_add_layer_norm_bwd,
        "triton": _triton("dropout_add_layer_norm_bwd"),
    },
    "cuda": {
        "reference": reference.dropout_add_layer_norm_bwd,
        "native": native.dropout_add_layer_norm_bwd_cuda,
        "triton": _triton("dropout_add_layer_norm_bwd"),
    },
}

DROPOUT_ADD_LAYER_NORM = library.Op("dropout_add_layer_norm", ADD_NORM_FORWARD, _why_not)
_ADD_NORM_INPUTS = "Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias, Tensor rng, int site, int threshold, float eps, str impl"
_dropout_add_layer_norm_fwd = library.define(
    f"dropout_add_layer_norm_fwd({_ADD_NORM_INPUTS}) -> (Tensor y, Tensor mean, Tensor rstd)",
    ADD_NORM_FORWARD,
    _dropout_add_layer_norm_fwd_fake,
)
_dropout_add_layer_norm_forward_only = library.define(
    f"dropout_add_layer_norm_forward_only({_ADD_NORM_INPUTS}) -> Tensor",
    ADD_NORM_FORWARD_ONLY,
    _dropout_add_layer_norm_forward_only_fake,
)
_dropout_add_layer_norm_bwd = library.define(
    "dropout_add_layer_norm_bwd(Tensor dy, Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias, Tensor mean,"
    " Tensor rstd, Tensor rng, int site, int threshold, str impl)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias)",
    ADD_NORM_BACKWARD,
    _dropout_add_layer_norm_bwd_fake,
)


def _dropout_add_layer_norm_setup(ctx, inputs, output):
    x, residual, weight, bias, x_bias, rng, ctx.site, ctx.threshold, _, ctx.impl = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd
    ctx.save_for_backward(x, residual, weight, bias, x_bias, mean, rstd, rng)


def _dropout_add_layer_norm_backward(ctx, dy, dmean, drstd):
    if dy is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # read once: under gradient checkpointing each read recomputes
    dx, dresidual, dweight, dbias, dx_bias = _dropout_add_layer_norm_bwd(dy, *saved, ctx.site, ctx.threshold, ctx.impl)
    return dx, dresidual, dweight, dbias, None if saved[4] is None else dx_bias, None, None, None, None, None


library.autograd("dropout_add_layer_norm_fwd", _dropout_add_layer_norm_setup, _dropout_add_layer_norm_backward)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    eps: float = 1e-12,
    impl: str = "auto",
) -> Tensor:
    """layer_norm(residual + dropout(x + x_bias)): the end of both halves of a post-LN layer (Devlin et al. 2018).

        x, residual   [..., C]  any floating dtype, the same
        weight, bias  [C]       of the norm; float32 or x's dtype
        x_bias        [C]       of the linear layer that made x; None = already added
        dropout_p     0..0.998  realised as round(256 p) / 256
        rng           [2] int64 (seed, step) on x's device, from new_rng; None = drawn from torch's generator
        site          an integer unique to the place in the model
        returns       [..., C]  in x's dtype; the sum is normalised in float32 without being rounded first

    The mask is a pure function of (seed, step, site, row, column); backward draws it again.

    Before:
        y = F.layer_norm(residual + F.dropout(F.linear(h, dense, x_bias), p), residual.shape[-1:], weight, bias, eps)
    After:
        x = F.linear(h, dense)
        y = sbk.ops.dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=p, eps=eps)
    """
    threshold, rng = philox.dropout_arguments("dropout_add_layer_norm", dropout_p, rng, site, x.device)
    _check_like("dropout_add_layer_norm", "residual", residual, x)
    rows = _rows(x)
    _check("dropout_add_layer_norm", rows, None, weight, bias, x_bias, eps)
    impl = DROPOUT_ADD_LAYER_NORM.resolve(impl, rows)
    arguments = (rows, residual.reshape(rows.shape), weight, bias, x_bias, rng, site, threshold, eps, impl)
    if _needs_grad(x, residual, weight, bias, x_bias):
        y, _, _ = _dropout_add_layer_norm_fwd(*arguments)
    else:
        y = _dropout_add_layer_norm_forward_only(*arguments)
    return y.reshape(x.shape)


def _dropout_add_fwd_fake(x, residual, x_bias, rng, site, threshold, impl):
    _check("dropout_add", x, residual, None, None, x_bias, 0.0)
    return _dense_like(x)


def _dropout_add_bwd_fake(dy, x_bias, rng, site, threshold, impl):
    return _dense_like(dy), _dx_bias_fake(dy, x_bias)


ADD_FORWARD = {
    "cpu": {
        "reference": reference.dropout_add_fwd,
        "native": native.dropout_add_fwd,
        "triton": _triton("dropout_add_fwd"),
    },
    "cuda": {
        "reference": reference.dropout_add_fwd,
        "native": native.dropout_add_fwd_cuda,
        "triton": _triton("dropout_add_fwd"),
    },
}
ADD_BACKWARD = {
    "cpu": {
        "reference": reference.dropout_add_bwd,
        "native": native.dropout_add_bwd,
        "triton": _triton("dropout_add_bwd"),
    },
    "cuda": {
        "reference": reference.dropout_add_bwd,
        "native": native.dropout_add_bwd_cuda,
        "triton": _triton("dropout_add_bwd"),
    },
}

DROPOUT_ADD = library.Op("dropout_add", ADD_FORWARD, _why_not)
_dropout_add_fwd = library.define(
    "dropout_add_fwd(Tensor x, Tensor residual, Tensor? x_bias, Tensor rng, int site, int threshold, str impl) -> Tensor",
    ADD_FORWARD,
    _dropout_add_fwd_fake,
)
_dropout_add_bwd = library.define(
    "dropout_add_bwd(Tensor dy, Tensor? x_bias, Tensor rng, int site, int threshold, str impl) -> (Tensor dx, Tensor dx_bias)",
    ADD_BACKWARD,
    _dropout_add_bwd_fake,
)


def _dropout_add_setup(ctx, inputs, output):
    _, _, x_bias, rng, ctx.site, ctx.threshold, ctx.impl = inputs
    ctx.save_for_backward(x_bias, rng)


def _dropout_add_backward(ctx, dy):
    x_bias, rng = ctx.saved_tensors
    dx, dx_bias = _dropout_add_bwd(dy, x_bias, rng, ctx.site, ctx.threshold, ctx.impl)
    return dx, dy, None if x_bias is None else dx_bias, None, None, None, None


library.autograd("dropout_add_fwd", _dropout_add_setup, _dropout_add_backward)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """residual + dropout(x + x_bias): the end of both halves of a pre-LN layer. Arguments as in dropout_add_layer_norm.

    No activation is saved for backward, so there is no forward-only twin.

    Before:
        y = residual + F.dropout(F.linear(h, dense, x_bias), p)
    After:
        y = sbk.ops.dropout_add(F.linear(h, dense), residual, x_bias=x_bias, dropout_p=p)
    """
    threshold, rng = philox.dropout_arguments("dropout_add", dropout_p, rng, site, x.device)
    _check_like("dropout_add", "residual", residual, x)
    rows = _rows(x)
    _check("dropout_add", rows, None, None, None, x_bias, 0.0)
    impl = DROPOUT_ADD.resolve(impl, rows)
    return _dropout_add_fwd(rows, residual.reshape(rows.shape), x_bias, rng, site, threshold, impl).reshape(x.shape)
