"""The backward of layer_norm, dropout_add_layer_norm and dropout_add in Triton. How rows lie in registers: triton_kernel.py.

Sums over rows are kept in registers while a program walks over its rows; it writes them once, as its row of `partial`
[planes, programs, C], and add_up_kernel adds these in a fixed order.
"""

import triton
import triton.language as tl

from stackbert_kernels.ops._triton_language import dropout_key, row_bytes
from stackbert_kernels.ops.layer_norm.triton_forward import NOT_SPECIALIZED, load_columns


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_bwd_kernel(
    dy_ptr,  # [R, C]
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C] or None
    x_bias_ptr,  # [C] or None
    weight_ptr,  # [C]
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    dx_ptr,  # [R, C] or None: it is dz
    dz_ptr,  # [R, C]
    partial_ptr,  # [2 or 3, programs, C]: dweight, dbias and, with x_bias, dx_bias
    rng_ptr,
    dy_stride,
    x_stride,
    residual_stride,
    rows,
    site,
    threshold,
    scale,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    DROPOUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With g = dy * weight and n = (z - mean) * rstd:  dz = rstd * (g - mean(g) - n * mean(g * n)), dx = dz * mask."""
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    weight, x_bias, dweight, dbias, dx_bias = (), (), (), (), ()
    for i in tl.static_range(CHUNKS):
        zero = tl.zeros((ROWS, COLUMNS), tl.float32)
        weight += (load_columns(weight_ptr, i, C, ROWS, COLUMNS),)
        dweight += (zero,)
        dbias += (zero,)
        if x_bias_ptr is not None:
            x_bias += (load_columns(x_bias_ptr, i, C, ROWS, COLUMNS),)
            dx_bias += (zero,)

    # The sums leave registers for 8 warps on an SM: too few to hide the loads, which therefore run ahead, into shared memory.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dys, xs, residuals = (), (), ()
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows)[:, None] & (c < C)
            dys += (tl.load(dy_ptr + row[:, None] * dy_stride + c, mask=inside, other=0.0),)
            xs += (tl.load(x_ptr + row[:, None] * x_stride + c, mask=inside, other=0.0),)
            if residual_ptr is not None:
                residuals += (tl.load(residual_ptr + row[:, None] * residual_stride + c, mask=inside, other=0.0),)

        normed, factors, new_dweight, new_dbias = (), (), (), ()
        sum_g = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_gn = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            z = xs[i].to(tl.float32)
            if x_bias_ptr is not None:
                z += x_bias[i]
            if DROPOUT:
                factors += (tl.where(row_bytes(k0, k1, row, i * COLUMNS, COLUMNS, GROUP) >= threshold, scale, 0.0),)
                z *= factors[i]
            if residual_ptr is not None:
                z += residuals[i].to(tl.float32)
            n = tl.where(c < C, (z - mean) * rstd, 0.0)
            dy = dys[i].to(tl.float32)
            g = dy * weight[i]
            new_dweight += (dweight[i] + dy * n,)
            new_dbias += (dbias[i] + dy,)
            sum_g += g
            sum_gn += g * n
            normed += (n,)
        dweight, dbias = new_dweight, new_dbias
        offset = (tl.sum(sum_g, 1) * (1.0 / C))[:, None] * rstd
        slope = (tl.sum(sum_gn, 1) * (1.0 / C))[:, None] * rstd

        new_dx_bias = ()
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows)[:, None] & (c < C)
            dz = dys[i].to(tl.float32) * weight[i] * rstd - (normed[i] * slope + offset)
            tl.store(dz_ptr + row[:, None] * C + c, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            if dx_ptr is not None:
                if DROPOUT:
                    dz *= factors[i]
                tl.store(dx_ptr + row[:, None] * C + c, dz.to(dx_ptr.dtype.element_ty), mask=inside)
            if x_bias_ptr is not None:
                new_dx_bias += (dx_bias[i] + dz,)  # rows past the last have rstd 0
        dx_bias = new_dx_bias

    store_sums(partial_ptr, 0, dweight, C, COLUMNS, CHUNKS)
    store_sums(partial_ptr, 1, dbias, C, COLUMNS, CHUNKS)
    if x_bias_ptr is not None:
        store_sums(partial_ptr, 2, dx_bias, C, COLUMNS, CHUNKS)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dropout_bias_bwd_kernel(
    dy_ptr,  # [R, C]
    dx_ptr,  # [R, C]
    partial_ptr,  # [1, programs, C]
    rng_ptr,
    dy_stride,
    rows,
    site,
    threshold,
    scale,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dx = dy * mask, and its sum over rows."""
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    dx_bias = ()
    for _ in tl.static_range(CHUNKS):
        dx_bias += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        dys, new_dx_bias = (), ()
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows)[:, None] & (c < C)
            dys += (tl.load(dy_ptr + row[:, None] * dy_stride + c, mask=inside, other=0.0),)
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows)[:, None] & (c < C)
            dx = dys[i].to(tl.float32)
            if DROPOUT:
                dx *= tl.where(row_bytes(k0, k1, row, i * COLUMNS, COLUMNS, GROUP) >= threshold, scale, 0.0)
            tl.store(dx_ptr + row[:, None] * C + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            new_dx_bias += (dx_bias[i] + dx,)
        dx_bias = new_dx_bias
    store_sums(partial_ptr, 0, dx_bias, C, COLUMNS, CHUNKS)


@triton.jit
def store_sums(partial_ptr, plane, sums, C: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """This program's row of plane `plane` of [planes, programs, C]."""
    row = (plane * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    for i in tl.static_range(CHUNKS):
        c = i * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial_ptr + row * C + c, tl.sum(sums[i], 0), mask=c < C)


@triton.jit(do_not_specialize=["programs"])
def add_up_kernel(
    partial_ptr,  # [planes, programs, C]
    first_ptr,  # [C]: the sum of plane 0
    second_ptr,  # [C] or None: of plane 1
    third_ptr,  # [C] or None
    programs,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    plane = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < programs) & (c < C)[None, :]
        total += tl.load(partial_ptr + (plane * programs + row) * C + c[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    tl.store(first_ptr + c, result.to(first_ptr.dtype.element_ty), mask=(c < C) & (plane == 0))
    if second_ptr is not None:
        tl.store(second_ptr + c, result.to(second_ptr.dtype.element_ty), mask=(c < C) & (plane == 1))
    if third_ptr is not None:
        tl.store(third_ptr + c, result.to(third_ptr.dtype.element_ty), mask=(c < C) & (plane == 2))
