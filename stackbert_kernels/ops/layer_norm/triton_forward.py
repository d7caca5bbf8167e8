"""The forward of layer_norm, dropout_add_layer_norm and dropout_add: one Triton kernel.

layer_norm is the one without residual, bias of x and dropout; dropout_add the one without norm. How rows lie in registers:
triton_kernel.py.
"""

import triton
import triton.language as tl

from stackbert_kernels.ops._triton_language import dropout_key, row_bytes

NOT_SPECIALIZED = ["rows", "site", "threshold"]  # their values must not make new kernels


@triton.jit
def load_columns(ptr, i, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Chunk i of a [C] parameter, [ROWS, COLUMNS]: each lane loads its own columns, where one row of it would go through shared memory."""
    c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C] or None
    x_bias_ptr,  # [C] or None
    weight_ptr,  # [C] or None: no norm
    bias_ptr,  # [C] or None
    y_ptr,  # [R, C]
    mean_ptr,  # [R] or None: nothing is kept for backward
    rstd_ptr,  # [R] or None
    rng_ptr,  # [2]
    x_stride,
    residual_stride,
    rows,
    site,
    threshold,
    scale,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None]

        xs, residuals = (), ()
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = there & (c < C)
            xs += (tl.load(x_ptr + row[:, None] * x_stride + c, mask=inside, other=0.0),)
            if residual_ptr is not None:
                residuals += (tl.load(residual_ptr + row[:, None] * residual_stride + c, mask=inside, other=0.0),)

        zs = ()
        for i in tl.static_range(CHUNKS):
            z = xs[i].to(tl.float32)
            if x_bias_ptr is not None:
                z += load_columns(x_bias_ptr, i, C, ROWS, COLUMNS)
            if DROPOUT:
                z *= tl.where(row_bytes(k0, k1, row, i * COLUMNS, COLUMNS, GROUP) >= threshold, scale, 0.0)
            if residual_ptr is not None:
                z += residuals[i].to(tl.float32)
            zs += (z,)

        if weight_ptr is not None:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in tl.static_range(CHUNKS):
                total += zs[i]  # 0 past the last column
            mean = tl.sum(total, 1) * (1.0 / C)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in tl.static_range(CHUNKS):
                c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                centred = tl.where(c < C, zs[i] - mean[:, None], 0.0)
                total += centred * centred
            rstd = tl.rsqrt(tl.sum(total, 1) * (1.0 / C) + eps)

        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            y = zs[i]
            if weight_ptr is not None:
                y = (y - mean[:, None]) * rstd[:, None] * load_columns(weight_ptr, i, C, ROWS, COLUMNS)
                y += load_columns(bias_ptr, i, C, ROWS, COLUMNS)
            tl.store(y_ptr + row[:, None] * C + c, y.to(y_ptr.dtype.element_ty), mask=there & (c < C))
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row < rows)
            tl.store(rstd_ptr + row, rstd, mask=row < rows)
