"""AdamW and the global norm in Triton. A step is one launch over all rows of all tensors, behind a tiny one that decides whether it is
taken; a norm is one over all tensors, before a tiny one that adds up.

What each program works on is in the tables of segments.py. 28 bytes move for an element (30 with a copy), 16 in an access of a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import _triton
from stackbert_kernels.ops.optimizer import segments, triton_layerwise
from stackbert_kernels.ops.optimizer.triton_step import at, counted, decided, power, squares_kernel, total

_W, _G, _M, _V, _C, _T = (tl.constexpr(f) for f in segments.ADDRESSES)
_SIZE, _DECAY, _FIRST, _WIDE, _FIELDS = (tl.constexpr(f) for f in (*segments.SIZES, segments.FIELDS))


@triton.jit(do_not_specialize=["rows", "lr", "max_norm"])
def prepare_kernel(
    table_ptr,  # [rows, FIELDS]
    norm_ptr,  # scalars, or None: 0, 1, 0
    scale_ptr,
    found_inf_ptr,
    skipped_ptr,  # [2] or None
    factors_ptr,  # [2 + 2 rows]: the gradients' factor, whether the step is skipped; of each row: step size, 1 / sqrt(1 - beta2^t)
    rows,
    lr,
    max_norm,
    BETA1: tl.constexpr,  # constants, because float32 is not enough for 1 - beta^t
    BETA2: tl.constexpr,
    ROWS: tl.constexpr,
):
    taken, factor = decided(norm_ptr, scale_ptr, found_inf_ptr, max_norm)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    step_ptr = tl.load(table_ptr + row * _FIELDS + _T, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=inside, other=0.0) + tl.where(taken, 1.0, 0.0)
    tl.store(step_ptr, step, mask=inside)
    n = tl.maximum(step, 1.0).to(tl.int64)
    base1, base2 = tl.full((ROWS,), BETA1, tl.float64), tl.full((ROWS,), BETA2, tl.float64)
    step_size = tl.cast(lr, tl.float64) / (1.0 - power(base1, n))
    root = 1.0 / tl.sqrt(1.0 - power(base2, n))
    tl.store(factors_ptr + 2 + 2 * row, step_size.to(tl.float32), mask=inside)
    tl.store(factors_ptr + 3 + 2 * row, root.to(tl.float32), mask=inside)

    if tl.program_id(0) == 0:
        tl.store(factors_ptr, factor)
        tl.store(factors_ptr + 1, tl.where(taken, 0.0, 1.0))
        counted(skipped_ptr, taken)


@triton.jit
def _update(
    line,
    factors_ptr,
    row,
    first,
    decayed,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    ELEMENTS: tl.constexpr,
    COPIES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Elements first .. first + ELEMENTS - 1 of a row. WIDE: all are there, for 16-byte accesses."""
    i = first + tl.arange(0, ELEMENTS)
    inside = None if WIDE else i < tl.load(line + _SIZE)
    w_ptr, g_ptr = at(tl.load(line + _W), i, WIDE), at(tl.load(line + _G), i, WIDE)
    m_ptr, v_ptr = at(tl.load(line + _M), i, WIDE), at(tl.load(line + _V), i, WIDE)
    factor, step_size, root = (
        tl.load(factors_ptr),
        tl.load(factors_ptr + 2 + 2 * row),
        tl.load(factors_ptr + 3 + 2 * row),
    )
    kept = tl.where(i < tl.load(line + _DECAY), decayed, 1.0)

    g = tl.load(g_ptr, mask=inside) * factor
    m = tl.load(m_ptr, mask=inside) * beta1 + g * rest1
    v = tl.load(v_ptr, mask=inside) * beta2 + g * g * rest2
    w = tl.load(w_ptr, mask=inside) * kept - tl.div_rn(m * step_size, tl.sqrt_rn(v) * root + eps)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    tl.store(w_ptr, w, mask=inside)
    if COPIES:
        tl.store(at(tl.load(line + _C), i, WIDE, tl.bfloat16), w.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["decayed", "beta1", "rest1", "beta2", "rest2", "eps"])
def adamw_kernel(
    table_ptr,  # [rows, FIELDS]
    lines_ptr,  # [programs]: the row that each works on
    factors_ptr,  # [2 + 2 rows]
    decayed,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    COPIES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PART: tl.constexpr,  # an element for each thread
):
    row = tl.load(lines_ptr + tl.program_id(0)).to(tl.int64)
    if tl.load(factors_ptr + 1) != 0.0:
        return
    line = table_ptr + row * _FIELDS
    block = tl.program_id(0) - tl.load(line + _FIRST)
    first = block * ELEMENTS
    if block < tl.load(line + _WIDE):
        _update(line, factors_ptr, row, first, decayed, beta1, rest1, beta2, rest2, eps, ELEMENTS, COPIES, True)
    else:  # the end of a tensor: little at a time takes no registers from the others
        for part in tl.range(0, ELEMENTS, PART):
            _update(line, factors_ptr, row, first + part, decayed, beta1, rest1, beta2, rest2, eps, PART, COPIES, False)


@triton.jit(do_not_specialize=["blocks"])
def total_kernel(partials_ptr, norm_ptr, blocks, BLOCKS: tl.constexpr):
    """One program."""
    tl.store(norm_ptr, tl.sqrt(total(partials_ptr, blocks, BLOCKS)).to(tl.float32))


@dataclass(frozen=True)
class Configuration:
    elements: int  # of a program
    num_warps: int


CANDIDATES = (Configuration(1024, 4), Configuration(2048, 4), Configuration(2048, 8), Configuration(4096, 8))
CONFIGURATIONS = {80: CANDIDATES[0], 90: CANDIDATES[0], 100: CANDIDATES[0]}


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    skipped: Tensor | None,
    decay: list[int],
    scalars: list[Tensor | None],
    numbers: list[float],
) -> None:
    lr, beta1, beta2, eps, weight_decay, max_norm = numbers
    device = weights[0].device
    chosen = _triton.configuration(CONFIGURATIONS, device)
    norm, scale, found_inf = (None if s is None else s.float() for s in scalars)
    with _triton.on(device):
        grads = [g.contiguous() for g in grads]
        table, lines = segments.tables(weights, grads, exp_avg, exp_avg_sq, copies, steps, decay, chosen.elements)
        rows = len(table)
        factors = torch.empty(2 + 2 * rows, device=device)
        prepare_kernel[(max(1, triton.cdiv(rows, 64)),)](
            table, norm, scale, found_inf, skipped, factors, rows, lr, max_norm, BETA1=beta1, BETA2=beta2, ROWS=64, num_warps=2
        )  # fmt: skip
        if len(lines):
            adamw_kernel[(len(lines),)](
                table, lines, factors, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
                COPIES=bool(copies), ELEMENTS=chosen.elements, PART=32 * chosen.num_warps, num_warps=chosen.num_warps,
            )  # fmt: skip


NORM_ELEMENTS, NORM_BLOCKS = 4096, 1024  # of a program
NORM_FIELDS = {"FIELDS": 4, "ADDRESS": 0, "SIZE": 1, "FIRST": 2}


def global_norm(tensors: list[Tensor]) -> Tensor:
    device = tensors[0].device
    with _triton.on(device):
        tensors = [t.contiguous() for t in tensors]
        table, lines = segments.norm_tables(tensors, NORM_ELEMENTS)
        norm, partials = tensors[0].new_empty(()), tensors[0].new_empty(len(lines))
        if len(lines):
            squares_kernel[(len(lines),)](table, lines, partials, ELEMENTS=NORM_ELEMENTS, **NORM_FIELDS, num_warps=8)
        total_kernel[(1,)](partials, norm, len(lines), BLOCKS=NORM_BLOCKS, num_warps=8)
    return norm


def compilations(arch: int) -> list[_triton.Compilation]:
    chosen = CONFIGURATIONS[arch]
    table = {"table_ptr": "*i64:16", "factors_ptr": "*fp32:16"}
    numbers = dict.fromkeys(("decayed", "beta1", "rest1", "beta2", "rest2", "eps"), "fp32")
    scalars = dict.fromkeys(("norm_ptr", "found_inf_ptr", "skipped_ptr"), "*fp32:16")
    return [
        *(
            _triton.Compilation(
                f"adamw{', bf16 copies' if copies else ''}",
                adamw_kernel,
                table | {"lines_ptr": "*i32:16"} | numbers,
                {"COPIES": copies, "ELEMENTS": chosen.elements, "PART": 32 * chosen.num_warps},
                num_warps=chosen.num_warps,
                max_registers=80,
                max_narrow=36,  # of the table and the factors; of the ends of tensors
            )
            for copies in (False, True)
        ),
        _triton.Compilation(
            "adamw prepare",
            prepare_kernel,
            table | scalars | {"rows": "i32", "lr": "fp32", "max_norm": "fp32"},
            {"scale_ptr": None, "BETA1": 0.9, "BETA2": 0.999, "ROWS": 64},
            num_warps=2,
            max_narrow=64,
        ),
        _triton.Compilation(
            "global_norm squares",
            squares_kernel,
            {"table_ptr": "*i64:16", "lines_ptr": "*i32:16", "partials_ptr": "*fp32:16"},
            {"ELEMENTS": NORM_ELEMENTS} | NORM_FIELDS,
            num_warps=8,
            max_registers=64,
            max_narrow=32,  # of the table; of the ends of tensors
        ),
        _triton.Compilation(
            "global_norm total",
            total_kernel,
            {"partials_ptr": "*fp32:16", "norm_ptr": "*fp32:16", "blocks": "i32"},
            {"BLOCKS": NORM_BLOCKS},
            num_warps=8,
            max_narrow=32,  # a number a load, several rounds of the loop at once
        ),
        *triton_layerwise.compilations(arch),
    ]
