"""What the optimizers' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power(base, n):
    """base^n by squaring in float64, as the C++ kernel has it; n [N] int64 below 2^25, the integers that float32 counts."""
    result = tl.full(n.shape, 1.0, tl.float64)
    for _ in tl.static_range(25):
        result = tl.where(n % 2 == 1, result * base, result)
        base *= base
        n = n // 2
    return result


@triton.jit
def decided(norm_ptr, scale_ptr, found_inf_ptr, max_norm):
    """Whether the step is taken, and what gradients are multiplied with. The pointers are to scalars, or None: 0, 1, 0."""
    scale, norm, found_inf = 1.0, 0.0, 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
    if found_inf_ptr is not None:
        found_inf = tl.load(found_inf_ptr)
    norm = tl.cast(norm * scale, tl.float32)
    taken = (tl.abs(norm) < float("inf")) & (found_inf == 0.0)  # false for NaN
    clip = tl.where(max_norm > 0.0, tl.div_rn(tl.cast(max_norm, tl.float32), norm + 1e-6), 1.0)
    return taken, scale * tl.minimum(clip, 1.0)


@triton.jit
def counted(skipped_ptr, taken):
    """skipped_ptr [2] or None."""
    if skipped_ptr is not None:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(taken, 0.0, 1.0))
        tl.store(skipped_ptr + 1, tl.where(taken, 0.0, tl.load(skipped_ptr + 1) + 1.0))


@triton.jit
def at(address, i, WIDE: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """Pointers to elements i of the array at `address`. WIDE: those of four elements are aligned, which Triton cannot know of a number in
    a table. (Not more than four: else a copy in bfloat16 would change threads to be stored 16 bytes at a time.)"""
    pointers = address.to(tl.pointer_type(dtype)) + i
    return tl.multiple_of(pointers, dtype.primitive_bitwidth // 2) if WIDE else pointers


@triton.jit
def squares_kernel(
    table_ptr,  # [lines, FIELDS]
    lines_ptr,
    partials_ptr,
    ELEMENTS: tl.constexpr,
    FIELDS: tl.constexpr,
    ADDRESS: tl.constexpr,  # which fields of a line these are; behind the first block comes how many are whole
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """The sum of squares of each block."""
    line = table_ptr + tl.load(lines_ptr + tl.program_id(0)).to(tl.int64) * FIELDS
    block = tl.program_id(0) - tl.load(line + FIRST)
    i = block * ELEMENTS + tl.arange(0, ELEMENTS)
    if block < tl.load(line + FIRST + 1):
        x = tl.load(at(tl.load(line + ADDRESS), i, True))
    else:
        x = tl.load(at(tl.load(line + ADDRESS), i, False), mask=i < tl.load(line + SIZE), other=0.0)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def total(partials_ptr, count, BLOCKS: tl.constexpr):
    """The sum of so many numbers, in float64."""
    sums = tl.zeros((BLOCKS,), tl.float64)
    first = count * 0  # a while loop, for the interpreter takes no argument as the bound of a range
    while first < count:
        i = first + tl.arange(0, BLOCKS)
        sums += tl.load(partials_ptr + i, mask=i < count, other=0.0).to(tl.float64)
        first += BLOCKS
    return tl.sum(sums, 0)
