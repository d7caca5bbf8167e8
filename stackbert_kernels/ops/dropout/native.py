"""Dropout by csrc/dropout. `run` is where it runs: _cpu or _cuda."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES


def _cpu(x: Tensor, /, **arguments) -> None:
    _C.dropout(threads=torch.get_num_threads(), **arguments)


def _cuda(x: Tensor, /, **arguments) -> None:
    library.launch("dropout_cuda", x, **arguments)


def _dropout(run: Callable, x: Tensor, rng: Tensor, site: int, threshold: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    run(
        x,
        x=x.data_ptr(),
        y=y.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=NATIVE_DTYPES[x.dtype],
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
    )
    return y


dropout, dropout_cuda = partial(_dropout, _cpu), partial(_dropout, _cuda)
