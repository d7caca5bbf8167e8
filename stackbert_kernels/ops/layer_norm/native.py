"""layer_norm, dropout_add_layer_norm and dropout_add by csrc/layer_norm. R rows, C columns.

One kernel serves both norms: layer_norm is the one without residual, bias of x and dropout.
"""

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, as_float32, empty_like


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(x: Tensor, extra: int) -> Tensor:
    """For each chunk of rows a row of scratch and `extra` rows, of partial sums and the like."""
    return torch.empty(_C.row_workspace(*x.shape, extra), dtype=torch.float32)


def _norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    rng: Tensor | None,
    site: int,
    threshold: int,
    eps: float,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias, x_bias = as_float32(weight), as_float32(bias), None if x_bias is None else as_float32(x_bias)
    y, workspace = empty_like(x), _workspace(x, 0)
    mean, rstd = (weight.new_empty(x.shape[0]), weight.new_empty(x.shape[0])) if statistics else (None, None)
    _C.layer_norm_fwd(
        x=x.data_ptr(),
        residual=_address(residual),
        x_bias=_address(x_bias),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        mean=_address(mean),
        rstd=_address(rstd),
        workspace=workspace.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=_address(rng),
        site=site,
        threshold=threshold,
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return y, mean, rstd


def _norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    site: int,
    threshold: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    dy, x, residual = dy.contiguous(), x.contiguous(), None if residual is None else residual.contiguous()
    scale, shift = as_float32(weight), None if x_bias is None else as_float32(x_bias)
    dx, dresidual = None if residual is None else empty_like(x), empty_like(x)
    dweight, dbias = torch.empty_like(scale), torch.empty_like(scale)
    dx_bias = scale.new_empty(0 if x_bias is None else x.shape[1])
    workspace = _workspace(x, 4)
    _C.layer_norm_bwd(
        dy=dy.data_ptr(),
        x=x.data_ptr(),
        residual=_address(residual),
        x_bias=_address(shift),
        weight=scale.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=_address(dx),
        dresidual=dresidual.data_ptr(),
        dweight=dweight.data_ptr(),
        dbias=dbias.data_ptr(),
        dx_bias=dx_bias.data_ptr(),  # 0 where empty
        workspace=workspace.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=_address(rng),
        site=site,
        threshold=threshold,
        threads=torch.get_num_threads(),
    )
    dx_bias = dx_bias if x_bias is None else dx_bias.to(x_bias.dtype)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype), dx_bias


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_fwd(x, None, weight, bias, None, None, 0, 0, eps, statistics=True)


def layer_norm_forward_only(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm_fwd(x, None, weight, bias, None, None, 0, 0, eps, statistics=False)[0]


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, dx, dweight, dbias, _ = _norm_bwd(dy, x, None, weight, bias, None, mean, rstd, None, 0, 0)
    return dx, dweight, dbias


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
    return _norm_fwd(x, residual, weight, bias, x_bias, rng, site, threshold, eps, statistics=True)


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
    return _norm_fwd(x, residual, weight, bias, x_bias, rng, site, threshold, eps, statistics=False)[0]


dropout_add_layer_norm_bwd = _norm_bwd


def dropout_add_fwd(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int
) -> Tensor:
    x, residual, x_bias = x.contiguous(), residual.contiguous(), None if x_bias is None else as_float32(x_bias)
    y, workspace = empty_like(x), _workspace(x, 0)
    _C.dropout_add_fwd(
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        x_bias=_address(x_bias),
        y=y.data_ptr(),
        workspace=workspace.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
        threads=torch.get_num_threads(),
    )
    return y


def dropout_add_bwd(dy: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    dx = empty_like(dy)
    dx_bias = torch.empty(0 if x_bias is None else dy.shape[1], dtype=torch.float32)
    workspace = _workspace(dy, 1)
    _C.dropout_add_bwd(
        dy=dy.data_ptr(),
        dx=dx.data_ptr(),
        dx_bias=dx_bias.data_ptr(),  # 0 where empty
        workspace=workspace.data_ptr(),
        rows=dy.shape[0],
        columns=dy.shape[1],
        dtype=NATIVE_DTYPES[dy.dtype],
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
        threads=torch.get_num_threads(),
    )
    return dx, dx_bias if x_bias is None else dx_bias.to(x_bias.dtype)
