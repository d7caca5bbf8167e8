"""The second half of every sum over rows: each program of a backward kernel leaves a row of partial sums, this adds them up.

Without atomics, in a fixed order: the same bits each time on the same GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import (
    _triton,
    _triton_language,  # noqa: F401  lets the interpreter run loops with a bound that is an argument
)

TILE = {"PARTS": 64, "COLUMNS": 32}
NUM_WARPS = 4


@triton.jit(do_not_specialize=["parts"])
def column_sums_kernel(parts_ptr, sums_ptr, parts, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        p = (first + tl.arange(0, PARTS)).to(tl.int64)[:, None]
        total += tl.load(parts_ptr + p * columns + c[None, :], mask=(p < parts) & (c < columns)[None, :], other=0.0)
    tl.store(sums_ptr + c, tl.sum(total, 0), mask=c < columns)


def column_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts [P, C] float32, dense -> their sums [C] in dtype."""
    sums = parts.new_empty(parts.shape[1], dtype=dtype)
    if sums.numel():
        grid = (triton.cdiv(parts.shape[1], TILE["COLUMNS"]),)
        with _triton.on(parts.device):
            column_sums_kernel[grid](parts, sums, *parts.shape, **TILE, num_warps=NUM_WARPS)
    return sums


def compilation(name: str) -> _triton.Compilation:
    return _triton.Compilation(
        name=name,
        kernel=column_sums_kernel,
        signature={"parts_ptr": "*fp32:16", "sums_ptr": "*fp32:16", "parts": "i32", "columns": "i32:16"},
        constants=TILE,
        num_warps=NUM_WARPS,
        max_registers=64,
        max_narrow=1,  # the sums: 32 numbers a program
    )
