"""bias_gelu in Triton. R rows, C columns. Memory is the bound, so what counts is that arithmetic stays under it.

gelu(u) = max(u, 0) - |u| tail(|u|) and gelu'(u) = slope(u) or 1 - slope(-u): both forms need one half of the axis only, where their
digits are. Only exp2 and rsqrt become single instructions; exp, erf and a division are five, twenty-five and eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import _triton
from stackbert_kernels.ops._triton_column_sums import column_sums
from stackbert_kernels.ops._triton_column_sums import compilation as column_sums_compilation

HALF_LOG2E = tl.constexpr(0.721347520444482)  # log2(e) / 2
BELL = tl.constexpr(0.398942280401433)  # 1 / sqrt(2 pi)
LINEAR = tl.constexpr(
    2.302208198144325
)  # 2 sqrt(2 / pi) log2(e): the tanh form is 1 / (1 + 2^-w), w = a (LINEAR + CUBIC a^2)
CUBIC = tl.constexpr(0.102943240)  # 0.044715 LINEAR
LN2 = tl.constexpr(0.693147180559945)


@triton.jit
def _reciprocal(x):
    """Of 1e-18 < x < 1e18, to 2^-22."""
    return tl.rsqrt(x * x)


@triton.jit
def _erf_tail(a, EXACT: tl.constexpr):
    """Phi(-a), a >= 0. EXACT: to 1e-6 of itself for a < 13; else to 1e-5 for a < 5, 4e-4 for a < 13. Both fall to 0 above."""
    if EXACT:
        # exp(-a^2 / 2) t P(t), t = 1 / (a + 3), as csrc/gelu.
        t = _reciprocal(a + 3.0)
        t = t * (2.0 - (a + 3.0) * t)
        p = t * -454.559326 + 860.549133
        p = p * t - 600.173706
        p = p * t + 162.164124
        p = p * t - 13.5350399
        p = p * t + 9.79034042
        p = p * t + 3.02900529
        p = p * t + 1.20245457
        p = p * t + 0.398859501
        return tl.exp2(a * a * -HALF_LOG2E) * (p * t)
    # log2 Phi(-a) is smooth: minimax on [0, 13.5], weighted towards a < 5. The first coefficient is below 0: no clamp for larger a.
    p = a * -2.1904176250586715e-09 + 1.575575936385576e-07
    p = p * a - 4.95363292429829e-06
    p = p * a + 9.031965601025149e-05
    p = p * a - 0.0010729827918112278
    p = p * a + 0.008901959285140038
    p = p * a - 0.054548416286706924
    p = p * a - 0.45803967118263245
    p = p * a - 1.1513649225234985
    p = p * a - 0.9999904632568359
    return tl.exp2(p)


@triton.jit
def _tanh_tail(a):
    """1 / (1 + exp(2 v)) and 1 / (1 + exp(-2 v)), v = sqrt(2 / pi) (a + 0.044715 a^3), a >= 0."""
    small = tl.exp2(-a * (LINEAR + CUBIC * (a * a)))
    share = _reciprocal(1.0 + small)
    return small * share, share


@triton.jit
def _gelu(u, TANH: tl.constexpr, EXACT: tl.constexpr):
    a = tl.abs(u)
    if TANH:
        tail, _ = _tanh_tail(a)
    else:
        tail = _erf_tail(a, EXACT)
    return tl.maximum(u, 0.0) - a * tail


@triton.jit
def _slope(u, TANH: tl.constexpr, EXACT: tl.constexpr):
    a = tl.abs(u)
    if TANH:
        tail, share = _tanh_tail(a)
        weighed = a * tail  # before a^2, which may be infinite where tail is 0
        down = tail - share * (LINEAR * LN2 * weighed + 3 * CUBIC * LN2 * (a * (a * weighed)))
    else:
        down = _erf_tail(a, EXACT) - a * (BELL * tl.exp2(a * a * -HALF_LOG2E))
    return tl.where(u < 0.0, down, 1.0 - down)


@triton.jit(do_not_specialize=["rows"])
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, x_stride, rows, C: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (c < C)

    x = tl.load(x_ptr + row * x_stride + c, mask=inside)
    u = x.to(tl.float32) + tl.load(bias_ptr + c, mask=c < C).to(tl.float32)
    y = _gelu(u, TANH, x.dtype == tl.float32)
    tl.store(y_ptr + row * C + c, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, parts_ptr, dy_stride, x_stride, rows, C: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program keeps the sums over all of its rows in registers; programs take turns at the rows, so that all end together.
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(bias_ptr + c, mask=c < C).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (c < C)
        x = tl.load(x_ptr + row * x_stride + c, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_stride + c, mask=inside, other=0.0).to(tl.float32)

        dx = dy * _slope(x.to(tl.float32) + bias, TANH, x.dtype == tl.float32)
        sums += dx
        tl.store(dx_ptr + row * C + c, dx, mask=inside)
    part = parts_ptr + tl.program_id(0).to(tl.int64) * C
    tl.store(part + c, tl.sum(sums, 0)[None, :], mask=c < C)


@dataclass(frozen=True)
class Configuration:
    columns: int  # of a tile, at most
    fwd_elements: int  # of a tile: one program's
    bwd_elements: int  # of a tile: a turn of the loop
    bwd_programs: int  # a multiprocessor; registers suffice for all of them at once
    num_warps: int

    @property
    def bwd_registers(self) -> int:
        return _triton.registers_of(self.num_warps * self.bwd_programs)


CANDIDATES = (
    Configuration(1024, 4096, 2048, 6, 4),
    Configuration(1024, 2048, 2048, 6, 4),
    Configuration(1024, 4096, 4096, 4, 4),
    Configuration(256, 4096, 2048, 6, 4),
)
CONFIGURATIONS = {80: CANDIDATES[0], 90: CANDIDATES[0], 100: CANDIDATES[0]}


def _tile(columns: int, elements: int, configuration: Configuration) -> dict[str, int]:
    """As wide as divides the columns, if that is 128 or more: lanes beyond the last column would only wait."""
    divisor = columns & -columns
    width = divisor if divisor >= 128 else triton.next_power_of_2(columns)
    width = max(16, min(width, configuration.columns))
    return {"C": columns, "ROWS": max(1, elements // width), "COLUMNS": width}


def bias_gelu_fwd(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    x, bias = _triton.dense_rows(x), bias.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    chosen = _triton.configuration(CONFIGURATIONS, x.device)
    tile = _tile(x.shape[1], chosen.fwd_elements, chosen)
    grid = (triton.cdiv(x.shape[0], tile["ROWS"]), triton.cdiv(x.shape[1], tile["COLUMNS"]))
    with _triton.on(x.device):
        bias_gelu_fwd_kernel[grid](
            x, bias, y, x.stride(0), x.shape[0], TANH=approximate == "tanh", **tile, num_warps=chosen.num_warps
        )
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dy, x, bias = _triton.dense_rows(dy), _triton.dense_rows(x), bias.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return dx, torch.zeros_like(bias)
    chosen = _triton.configuration(CONFIGURATIONS, x.device)
    tile = _tile(x.shape[1], chosen.bwd_elements, chosen)
    across = triton.cdiv(x.shape[1], tile["COLUMNS"])
    down = triton.cdiv(chosen.bwd_programs * _triton.multiprocessors(x.device), across)
    down = min(down, triton.cdiv(x.shape[0], tile["ROWS"]))
    parts = x.new_empty(down, x.shape[1], dtype=torch.float32)
    with _triton.on(x.device):
        bias_gelu_bwd_kernel[(down, across)](
            dy, x, bias, dx, parts, dy.stride(0), x.stride(0), x.shape[0], TANH=approximate == "tanh", **tile,
            num_warps=chosen.num_warps, maxnreg=chosen.bwd_registers,
        )  # fmt: skip
    return dx, column_sums(parts, bias.dtype)


def compilations(arch: int) -> list[_triton.Compilation]:
    chosen = CONFIGURATIONS[arch]
    found = [column_sums_compilation("bias_gelu dbias")]
    for columns, dtype, approximate in (
        (3072, "bf16", "none"),
        (3072, "bf16", "tanh"),
        (4096, "bf16", "none"),
        (768, "fp16", "none"),
        (3072, "fp32", "none"),
    ):
        types = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), f"*{dtype}:16")
        types |= dict.fromkeys(("bias_ptr", "parts_ptr"), "*fp32:16")
        types |= {"x_stride": "i32:16", "dy_stride": "i32:16", "rows": "i32"}
        for name, kernel, elements, registers in (
            ("forward", bias_gelu_fwd_kernel, chosen.fwd_elements, None),
            ("backward", bias_gelu_bwd_kernel, chosen.bwd_elements, chosen.bwd_registers),
        ):
            found.append(
                _triton.Compilation(
                    name=f"bias_gelu {name} {columns} {dtype} {approximate}",
                    kernel=kernel,
                    signature={argument: types[argument] for argument in kernel.arg_names if argument in types},
                    constants=_tile(columns, elements, chosen) | {"TANH": approximate == "tanh"},
                    num_warps=chosen.num_warps,
                    maxnreg=registers,
                    max_registers=registers or 64,
                    max_narrow=2 * (columns == 768),  # bias and sums: 256 columns for 128 threads
                )
            )
    return found
