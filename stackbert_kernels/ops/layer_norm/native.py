"""layer_norm, dropout_add_layer_norm and dropout_add by csrc/layer_norm. R rows, C columns.

One kernel serves both norms: layer_norm is the one without residual, bias of x and dropout. `run` is where it runs: _cpu or _cuda.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, as_float32, empty_like


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(x: Tensor, extra: int) -> Tensor:
    """For each chunk of rows a row of scratch and `extra` rows, of partial sums and the like."""
    return torch.empty(_C.row_workspace(*x.shape, extra), dtype=torch.float32)


def _cpu(function: str, x: Tensor, extra: int, /, **arguments) -> None:
    workspace = _workspace(x, extra)
    getattr(_C, function)(workspace=workspace.data_ptr(), threads=torch.get_num_threads(), **arguments)


def _cuda(function: str, x: Tensor, extra: int, /, **arguments) -> None:
    if extra:
        floats = library.ask(f"{function}_workspace_cuda", x, rows=x.shape[0], columns=x.shape[1])
        workspace = x.new_empty(floats, dtype=torch.float32)
        arguments["workspace"] = workspace.data_ptr()
    library.launch(f"{function}_cuda", x, **arguments)


def _norm_fwd(
    run: Callable,
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
    y = empty_like(x)
    mean, rstd = (weight.new_empty(x.shape[0]), weight.new_empty(x.shape[0])) if statistics else (None, None)
    run(
        "layer_norm_fwd",
        x,
        0,
        x=x.data_ptr(),
        residual=_address(residual),
        x_bias=_address(x_bias),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        mean=_address(mean),
        rstd=_address(rstd),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=_address(rng),
        site=site,
        threshold=threshold,
        eps=eps,
    )
    return y, mean, rstd


def _norm_bwd(
    run: Callable,
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
    run(
        "layer_norm_bwd",
        x,
        4,
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
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=_address(rng),
        site=site,
        threshold=threshold,
    )
    dx_bias = dx_bias if x_bias is None else dx_bias.to(x_bias.dtype)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype), dx_bias


def _layer_norm_fwd(
    run: Callable, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_fwd(run, x, None, weight, bias, None, None, 0, 0, eps, statistics=True)


def _layer_norm_forward_only(run: Callable, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm_fwd(run, x, None, weight, bias, None, None, 0, 0, eps, statistics=False)[0]


def _layer_norm_bwd(
    run: Callable, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, dx, dweight, dbias, _ = _norm_bwd(run, dy, x, None, weight, bias, None, mean, rstd, None, 0, 0)
    return dx, dweight, dbias


def _dropout_add_layer_norm_fwd(run: Callable, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_fwd(run, *arguments, statistics=True)


def _dropout_add_layer_norm_forward_only(run: Callable, *arguments) -> Tensor:
    return _norm_fwd(run, *arguments, statistics=False)[0]


layer_norm_fwd, layer_norm_fwd_cuda = partial(_layer_norm_fwd, _cpu), partial(_layer_norm_fwd, _cuda)
layer_norm_forward_only = partial(_layer_norm_forward_only, _cpu)
layer_norm_forward_only_cuda = partial(_layer_norm_forward_only, _cuda)
layer_norm_bwd, layer_norm_bwd_cuda = partial(_layer_norm_bwd, _cpu), partial(_layer_norm_bwd, _cuda)
dropout_add_layer_norm_fwd = partial(_dropout_add_layer_norm_fwd, _cpu)
dropout_add_layer_norm_fwd_cuda = partial(_dropout_add_layer_norm_fwd, _cuda)
dropout_add_layer_norm_forward_only = partial(_dropout_add_layer_norm_forward_only, _cpu)
dropout_add_layer_norm_forward_only_cuda = partial(_dropout_add_layer_norm_forward_only, _cuda)
dropout_add_layer_norm_bwd, dropout_add_layer_norm_bwd_cuda = partial(_norm_bwd, _cpu), partial(_norm_bwd, _cuda)


def _dropout_add_fwd(
    run: Callable, x: Tensor, residual: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int
) -> Tensor:
    x, residual, x_bias = x.contiguous(), residual.contiguous(), None if x_bias is None else as_float32(x_bias)
    y = empty_like(x)
    run(
        "dropout_add_fwd",
        x,
        0,
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        x_bias=_address(x_bias),
        y=y.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
    )
    return y


def _dropout_add_bwd(
    run: Callable, dy: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int
) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    dx = empty_like(dy)
    dx_bias = dy.new_empty(0 if x_bias is None else dy.shape[1], dtype=torch.float32)
    run(
        "dropout_add_bwd",
        dy,
        1,
        dy=dy.data_ptr(),
        dx=dx.data_ptr(),
        dx_bias=dx_bias.data_ptr(),  # 0 where empty
        rows=dy.shape[0],
        columns=dy.shape[1],
        dtype=NATIVE_DTYPES[dy.dtype],
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
    )
    return dx, dx_bias if x_bias is None else dx_bias.to(x_bias.dtype)


dropout_add_fwd, dropout_add_fwd_cuda = partial(_dropout_add_fwd, _cpu), partial(_dropout_add_fwd, _cuda)
dropout_add_bwd, dropout_add_bwd_cuda = partial(_dropout_add_bwd, _cpu), partial(_dropout_add_bwd, _cuda)
