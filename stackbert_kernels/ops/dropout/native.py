"""Dropout by csrc/dropout."""

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C, NATIVE_DTYPES


def dropout(x: Tensor, rng: Tensor, site: int, threshold: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, columns = x.shape
    _C.dropout(
        x.data_ptr(),
        y.data_ptr(),
        rows,
        columns,
        NATIVE_DTYPES[x.dtype],
        rng.data_ptr(),
        site,
        threshold,
        torch.get_num_threads(),
    )
    return y
