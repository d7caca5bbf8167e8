"""bias_gelu by csrc/gelu. `run` is where it runs: _cpu or _cuda."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, as_float32, empty_like


def _cpu(function: str, x: Tensor, /, **arguments) -> None:
    getattr(_C, function)(threads=torch.get_num_threads(), **arguments)


def _cuda(function: str, x: Tensor, /, **arguments) -> None:
    library.launch(f"{function}_cuda", x, **arguments)


def _cpu_workspace(x: Tensor) -> int:
    return _C.bias_gelu_workspace(*x.shape)


def _cuda_workspace(x: Tensor) -> int:
    return library.ask("bias_gelu_bwd_workspace_cuda", x, rows=x.shape[0], columns=x.shape[1])


def _bias_gelu_fwd(run: Callable, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    x, bias = x.contiguous(), as_float32(bias)
    y = empty_like(x)
    run(
        "bias_gelu_fwd",
        x,
        x=x.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        tanh=approximate == "tanh",
    )
    return y


def _bias_gelu_bwd(
    run: Callable, floats: Callable, dy: Tensor, x: Tensor, bias: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    dy, x, parameter = dy.contiguous(), x.contiguous(), as_float32(bias)
    dx, dbias = empty_like(x), torch.empty_like(parameter)
    workspace = parameter.new_empty(floats(x))
    run(
        "bias_gelu_bwd",
        x,
        dy=dy.data_ptr(),
        x=x.data_ptr(),
        bias=parameter.data_ptr(),
        dx=dx.data_ptr(),
        dbias=dbias.data_ptr(),
        workspace=workspace.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        tanh=approximate == "tanh",
    )
    return dx, dbias.to(bias.dtype)


bias_gelu_fwd, bias_gelu_fwd_cuda = partial(_bias_gelu_fwd, _cpu), partial(_bias_gelu_fwd, _cuda)
bias_gelu_bwd = partial(_bias_gelu_bwd, _cpu, _cpu_workspace)
bias_gelu_bwd_cuda = partial(_bias_gelu_bwd, _cuda, _cuda_workspace)
