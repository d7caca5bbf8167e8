"""Dropout in Triton. R rows, C columns. Reads x, writes y; the mask is drawn where it is needed and never stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import _triton, philox
from stackbert_kernels.ops._triton_language import dropout_key, row_bytes


@triton.jit(do_not_specialize=["rows", "site", "threshold", "scale"])
def dropout_kernel(
    x_ptr, y_ptr, rng_ptr, x_stride, rows, site, threshold, scale, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    k0, k1 = dropout_key(rng_ptr, site)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    c = first + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (c < C)

    x = tl.load(x_ptr + row[:, None] * x_stride + c, mask=inside)
    kept = row_bytes(k0, k1, row, first, COLUMNS, GROUP) >= threshold
    y = x.to(tl.float32) * tl.where(kept, scale, 0.0)
    tl.store(y_ptr + row[:, None] * C + c, y, mask=inside)


@dataclass(frozen=True)
class Configuration:
    columns: int  # of a tile, at most
    elements: int  # of a tile: one program's
    num_warps: int


CANDIDATES = (Configuration(256, 2048, 4), Configuration(256, 4096, 4), Configuration(1024, 4096, 4))
CONFIGURATIONS = {80: CANDIDATES[0], 90: CANDIDATES[0], 100: CANDIDATES[0]}


def _constants(columns: int, itemsize: int, configuration: Configuration) -> dict[str, int]:
    tile = min(max(triton.next_power_of_2(columns), 16), configuration.columns)
    return {"C": columns, "ROWS": configuration.elements // tile, "COLUMNS": tile, "GROUP": 16 // itemsize}


def dropout(x: Tensor, rng: Tensor, site: int, threshold: int) -> Tensor:
    x = _triton.dense_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    rows, columns = x.shape
    chosen = _triton.configuration(CONFIGURATIONS, x.device)
    constants = _constants(columns, x.element_size(), chosen)
    grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(columns, constants["COLUMNS"]))
    with _triton.on(x.device):
        dropout_kernel[grid](
            x, y, rng, x.stride(0), rows, site, threshold, philox.scale(threshold), **constants, num_warps=chosen.num_warps
        )  # fmt: skip
    return y


def compilations(arch: int) -> list[_triton.Compilation]:
    chosen = CONFIGURATIONS[arch]
    return [
        _triton.Compilation(
            name=f"dropout {columns} {dtype}",
            kernel=dropout_kernel,
            signature={
                "x_ptr": f"*{dtype}:16",
                "y_ptr": f"*{dtype}:16",
                "rng_ptr": "*i64:16",
                "x_stride": "i32:16",
                "rows": "i32",
                "site": "i32",
                "threshold": "i32",
                "scale": "fp32",
            },
            constants=_constants(columns, 4 if dtype == "fp32" else 2, chosen),
            num_warps=chosen.num_warps,
            max_registers=64,
            max_narrow=2,  # seed and step
        )
        for columns, dtype in ((768, "bf16"), (1024, "bf16"), (768, "fp32"))
    ]
