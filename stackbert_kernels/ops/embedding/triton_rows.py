"""embedding_layer_norm token by token in Triton. How rows lie in registers: ops/layer_norm/triton_kernel.py. T tokens, C columns.

An index out of range: nothing is read, and the token's mean is NaN, which makes its whole row of the result, and of dz, NaN.
"""

import triton
import triton.language as tl

from stackbert_kernels.ops._triton_language import dropout_key, row_bytes
from stackbert_kernels.ops.layer_norm.triton_backward import store_sums
from stackbert_kernels.ops.layer_norm.triton_forward import load_columns

NOT_SPECIALIZED = ["tokens", "site", "threshold", "words", "positions", "token_types"]


@triton.jit
def _row_of(index_ptr, token, tokens, rows):
    """The row of a table that each token reads, and whether there is one."""
    row = tl.load(index_ptr + token, mask=token < tokens, other=0)
    return row, (token < tokens) & (row >= 0) & (row < rows)


@triton.jit
def _load(table_ptr, row, valid, i, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Chunk i of the rows, 0 where there is none."""
    c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(table_ptr + row[:, None] * C + c, mask=valid[:, None] & (c < C), other=0.0)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    ids_ptr,  # [T]
    positions_ptr,  # [T]
    token_types_ptr,  # [T]
    word_ptr,  # [words, C]
    position_ptr,  # [positions, C]
    token_type_ptr,  # [token_types, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [T, C]
    mean_ptr,  # [T] or None: nothing is kept for backward
    rstd_ptr,  # [T] or None
    rng_ptr,  # [2] or None: no dropout
    tokens,
    words,
    positions,
    token_types,
    site,
    threshold,
    scale,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    if rng_ptr is not None:
        k0, k1 = dropout_key(rng_ptr, site)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        token = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        word, has_word = _row_of(ids_ptr, token, tokens, words)
        position, has_position = _row_of(positions_ptr, token, tokens, positions)
        token_type, has_type = _row_of(token_types_ptr, token, tokens, token_types)

        loaded = ()
        for i in tl.static_range(CHUNKS):
            loaded += (
                _load(word_ptr, word, has_word, i, C, COLUMNS),
                _load(position_ptr, position, has_position, i, C, COLUMNS),
                _load(token_type_ptr, token_type, has_type, i, C, COLUMNS),
            )
        zs, total = (), tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(CHUNKS):
            z = loaded[3 * i].to(tl.float32) + loaded[3 * i + 1].to(tl.float32) + loaded[3 * i + 2].to(tl.float32)
            zs += (z,)
            total += z  # 0 past the last column
        mean = tl.sum(total, 1) * (1.0 / C)
        mean = tl.where(has_word & has_position & has_type, mean, float("nan"))
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            centred = tl.where(c < C, zs[i] - mean[:, None], 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, 1) * (1.0 / C) + eps)

        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            y = (zs[i] - mean[:, None]) * rstd[:, None] * load_columns(weight_ptr, i, C, ROWS, COLUMNS)
            y += load_columns(bias_ptr, i, C, ROWS, COLUMNS)
            if rng_ptr is not None:
                y *= tl.where(row_bytes(k0, k1, token, i * COLUMNS, COLUMNS, GROUP) >= threshold, scale, 0.0)
            inside = (token < tokens)[:, None] & (c < C)
            tl.store(y_ptr + token[:, None] * C + c, y.to(y_ptr.dtype.element_ty), mask=inside)
        if mean_ptr is not None:
            tl.store(mean_ptr + token, mean, mask=token < tokens)
            tl.store(rstd_ptr + token, rstd, mask=token < tokens)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_kernel(
    dy_ptr,  # [T, C]
    ids_ptr,  # [T]
    positions_ptr,  # [T]
    token_types_ptr,  # [T]
    word_ptr,  # [words, C]
    position_ptr,  # [positions, C]
    token_type_ptr,  # [token_types, C]
    weight_ptr,  # [C]
    mean_ptr,  # [T]
    rstd_ptr,  # [T]
    dz_ptr,  # [T, C] float32
    partial_ptr,  # [2, programs, C]: dweight, dbias
    rng_ptr,  # [2] or None
    dy_stride,
    tokens,
    words,
    positions,
    token_types,
    site,
    threshold,
    scale,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """With u = dy * mask, g = u * weight and n = (z - mean) * rstd:  dz = rstd * (g - mean(g) - n * mean(g * n))."""
    if rng_ptr is not None:
        k0, k1 = dropout_key(rng_ptr, site)
    dweight, dbias = (), ()
    for _ in tl.static_range(CHUNKS):
        zero = tl.zeros((ROWS, COLUMNS), tl.float32)
        dweight += (zero,)
        dbias += (zero,)

    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        token = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        word, has_word = _row_of(ids_ptr, token, tokens, words)
        position, has_position = _row_of(positions_ptr, token, tokens, positions)
        token_type, has_type = _row_of(token_types_ptr, token, tokens, token_types)
        mean = tl.load(mean_ptr + token, mask=token < tokens, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + token, mask=token < tokens, other=0.0)[:, None]
        loaded = ()
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = (token < tokens)[:, None] & (c < C)
            loaded += (
                tl.load(dy_ptr + token[:, None] * dy_stride + c, mask=inside, other=0.0),
                _load(word_ptr, word, has_word, i, C, COLUMNS),
                _load(position_ptr, position, has_position, i, C, COLUMNS),
                _load(token_type_ptr, token_type, has_type, i, C, COLUMNS),
            )

        gs, normed, new_dweight, new_dbias = (), (), (), ()
        sum_g = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_gn = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            up, z = loaded[4 * i].to(tl.float32), loaded[4 * i + 1].to(tl.float32) + loaded[4 * i + 2].to(tl.float32)
            z += loaded[4 * i + 3].to(tl.float32)
            if rng_ptr is not None:
                up *= tl.where(row_bytes(k0, k1, token, i * COLUMNS, COLUMNS, GROUP) >= threshold, scale, 0.0)
            n = tl.where(c < C, (z - mean) * rstd, 0.0)
            g = up * load_columns(weight_ptr, i, C, ROWS, COLUMNS)
            new_dweight += (dweight[i] + up * n,)
            new_dbias += (dbias[i] + up,)
            sum_g += g
            sum_gn += g * n
            gs += (g,)
            normed += (n,)
        dweight, dbias = new_dweight, new_dbias
        offset = (tl.sum(sum_g, 1) * (1.0 / C))[:, None]
        slope = (tl.sum(sum_gn, 1) * (1.0 / C))[:, None]
        for i in tl.static_range(CHUNKS):
            c = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            dz = (gs[i] - offset - normed[i] * slope) * rstd
            tl.store(dz_ptr + token[:, None] * C + c, dz, mask=(token < tokens)[:, None] & (c < C))

    store_sums(partial_ptr, 0, dweight, C, COLUMNS, CHUNKS)
    store_sums(partial_ptr, 1, dbias, C, COLUMNS, CHUNKS)
