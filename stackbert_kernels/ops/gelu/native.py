"""bias_gelu by csrc/gelu."""

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, as_float32, empty_like


def bias_gelu_fwd(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    x, bias = x.contiguous(), as_float32(bias)
    y = empty_like(x)
    _C.bias_gelu_fwd(
        x=x.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        tanh=approximate == "tanh",
        threads=torch.get_num_threads(),
    )
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dy, x, parameter = dy.contiguous(), x.contiguous(), as_float32(bias)
    dx, dbias = empty_like(x), torch.empty_like(parameter)
    workspace = parameter.new_empty(_C.bias_gelu_workspace(*x.shape))
    _C.bias_gelu_bwd(
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
        threads=torch.get_num_threads(),
    )
    return dx, dbias.to(bias.dtype)
