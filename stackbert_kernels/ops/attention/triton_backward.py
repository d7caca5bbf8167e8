"""Attention's backward kernels in Triton. Legend and conventions: triton_forward.py.

With P = softmax(Q K^T scale), M the dropout factors and delta = rowsum(dO * O):

    dV = (M P)^T dO        dP = M (dO V^T)        dS = P (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

Sequences of one key-value tile are done whole by one program: five matrix products, every tensor read and written once. Longer ones take two
kernels, one that owns queries (delta, dQ) and one that owns keys (dK, dV): seven products instead of five, and neither atomics nor a
float32 dQ in memory. Everything is summed in one order: the same bits each time. The mask is drawn again: 1.2 instructions a score, where
a stored one costs about as much to pack and unpack, and its traffic.

1 / keep rate, the factor of M, is taken out of the tiles: dV, dQ and dK are scaled by it at the end, delta is divided by it at the start.
"""

import triton
import triton.language as tl

from stackbert_kernels.ops._triton_language import attention_kept, dropout_key
from stackbert_kernels.ops.attention.triton_forward import LOG2E, NUMBERS, extent, load_rows, product, store_rows


@triton.jit
def tile_gradients(
    q, k, v, dout, statistics, query, first_key, place,
    KEYS: tl.constexpr, ONLY_DS: tl.constexpr, BRANCH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(M P, dS) of a tile; (P, dS) where dS alone is wanted; without the factors 1 / keep rate and scale.

    statistics: those of row_statistics. place: (sequence, head, length, scale, the two words of the dropout key, threshold).
    """
    lse, delta = statistics
    sequence, head, length, scale, k0, k1, threshold = place
    scores = product(q, tl.trans(k))
    p = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
    # Keys past the length are zeros, yet their p is not, and may be infinite: infinity * 0 in dQ. A branch costs registers, leaving it
    # out 1.5 instructions a score.
    if BRANCH:
        if first_key + KEYS > length:
            p = tl.where((first_key + tl.arange(0, KEYS) < length)[None, :], p, 0.0)
    else:
        p = tl.where((first_key + tl.arange(0, KEYS) < length)[None, :], p, 0.0)
    if DROPOUT:
        kept = attention_kept(k0, k1, sequence, head, query, first_key, threshold, KEYS)
    dropped = p
    if ONLY_DS:
        dp = product(dout, tl.trans(v))
        if DROPOUT:
            dp = tl.where(kept, dp, 0.0)
        ds = p * (dp - delta[:, None])
    else:  # with M P at hand, M dP is not needed: fewer registers
        if DROPOUT:
            dropped = tl.where(kept, p, scale * 0.0)  # a constant would be selected after packing to 16 bits
        p_delta = p * delta[:, None]
        dp = product(dout, tl.trans(v))
        ds = dropped * dp - p_delta
    return dropped.to(q.dtype), ds.to(q.dtype)


@triton.jit
def row_statistics(
    out_ptr, out_token, lse_ptr, dout, start, length, factor,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(log-sum-exp of base 2, delta divided by 1 / keep rate) of the rows start .. start + ROWS - 1."""
    out = load_rows(out_ptr, start, out_token, length, ROWS, HEAD_DIM, BLOCK_D)
    row = start + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < length, other=0.0) * LOG2E
    return lse, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) / factor


@triton.jit(do_not_specialize=NUMBERS)
def attention_bwd_one_tile_kernel(
    dout_ptr, dout_batch, dout_token, dout_head,
    q_ptr, q_batch, q_token, q_head,
    k_ptr, k_batch, k_token, k_head,
    v_ptr, v_batch, v_token, v_head,
    out_ptr, out_batch, out_token,
    lse_ptr, lse_batch, lse_head,
    dq_ptr, dk_ptr, dv_ptr, dx_batch, dx_token,
    seqlens_ptr, heads, padded_rows, scale,
    rng_ptr, site, threshold, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TWO: tl.constexpr,
    PACKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A program does one (sequence, head) of up to BLOCK, or with TWO up to 2 BLOCK tokens; of longer ones, which are the other kernels',
    nothing. Every row is read once and stays in shared memory; the order of the four tiles keeps three gradients in registers."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first, length, rows = extent(seqlens_ptr, sequence, padded_rows, PACKED)
    if length > (2 * BLOCK if TWO else BLOCK):
        return
    dout_ptr += sequence * dout_batch + first * dout_token + head * dout_head
    q_ptr += sequence * q_batch + first * q_token + head * q_head
    k_ptr += sequence * k_batch + first * k_token + head * k_head
    v_ptr += sequence * v_batch + first * v_token + head * v_head
    out_ptr += sequence * out_batch + first * out_token + head * HEAD_DIM
    lse_ptr += sequence * lse_batch + head * lse_head + first
    dx = sequence * dx_batch + first * dx_token + head * HEAD_DIM
    dq_ptr += dx
    dk_ptr += dx
    dv_ptr += dx
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    place = (sequence, head, length, scale, k0, k1, threshold)

    rows_a = tl.arange(0, BLOCK)
    k_a = load_rows(k_ptr, 0, k_token, length, BLOCK, HEAD_DIM, BLOCK_D)
    v_a = load_rows(v_ptr, 0, v_token, length, BLOCK, HEAD_DIM, BLOCK_D)
    q_a = load_rows(q_ptr, 0, q_token, length, BLOCK, HEAD_DIM, BLOCK_D)
    do_a = load_rows(dout_ptr, 0, dout_token, length, BLOCK, HEAD_DIM, BLOCK_D)
    statistics_a = row_statistics(out_ptr, out_token, lse_ptr, do_a, 0, length, factor, BLOCK, HEAD_DIM, BLOCK_D)
    if TWO:
        rows_b = BLOCK + rows_a
        k_b = load_rows(k_ptr, BLOCK, k_token, length, BLOCK, HEAD_DIM, BLOCK_D)
        v_b = load_rows(v_ptr, BLOCK, v_token, length, BLOCK, HEAD_DIM, BLOCK_D)
        q_b = load_rows(q_ptr, BLOCK, q_token, length, BLOCK, HEAD_DIM, BLOCK_D)
        do_b = load_rows(dout_ptr, BLOCK, dout_token, length, BLOCK, HEAD_DIM, BLOCK_D)
        statistics_b = row_statistics(
            out_ptr, out_token, lse_ptr, do_b, BLOCK, length, factor, BLOCK, HEAD_DIM, BLOCK_D
        )

    dropped, ds = tile_gradients(q_a, k_a, v_a, do_a, statistics_a, rows_a, 0, place, BLOCK, False, False, DROPOUT)
    dv = product(tl.trans(do_a), dropped)  # [D, keys], as dk
    dk = product(tl.trans(q_a), ds)
    dq_a = product(ds, k_a)
    if TWO:
        dropped, ds = tile_gradients(q_b, k_a, v_a, do_b, statistics_b, rows_b, 0, place, BLOCK, False, False, DROPOUT)
        dv = product(tl.trans(do_b), dropped, dv)
        dk = product(tl.trans(q_b), ds, dk)
        dq_b = product(ds, k_a)
    store_rows(dv_ptr, tl.trans(dv * factor), 0, dx_token, rows, HEAD_DIM)
    store_rows(dk_ptr, tl.trans(dk * (scale * factor)), 0, dx_token, rows, HEAD_DIM)
    if TWO:
        dropped, ds = tile_gradients(
            q_b, k_b, v_b, do_b, statistics_b, rows_b, BLOCK, place, BLOCK, False, False, DROPOUT
        )
        dv = product(tl.trans(do_b), dropped)
        dk = product(tl.trans(q_b), ds)
        dq_b = product(ds, k_b, dq_b)
        store_rows(dq_ptr, dq_b * (scale * factor), BLOCK, dx_token, rows, HEAD_DIM)
        dropped, ds = tile_gradients(
            q_a, k_b, v_b, do_a, statistics_a, rows_a, BLOCK, place, BLOCK, False, False, DROPOUT
        )
        dv = product(tl.trans(do_a), dropped, dv)
        dk = product(tl.trans(q_a), ds, dk)
        dq_a = product(ds, k_b, dq_a)
        store_rows(dv_ptr, tl.trans(dv * factor), BLOCK, dx_token, rows, HEAD_DIM)
        store_rows(dk_ptr, tl.trans(dk * (scale * factor)), BLOCK, dx_token, rows, HEAD_DIM)
    store_rows(dq_ptr, dq_a * (scale * factor), 0, dx_token, rows, HEAD_DIM)


@triton.jit(do_not_specialize=NUMBERS)
def attention_bwd_dq_kernel(
    dout_ptr, dout_batch, dout_token, dout_head,
    q_ptr, q_batch, q_token, q_head,
    k_ptr, k_batch, k_token, k_head,
    v_ptr, v_batch, v_token, v_head,
    out_ptr, out_batch, out_token,
    lse_ptr, delta_ptr, lse_batch, lse_head,
    dq_ptr, dx_batch, dx_token,
    seqlens_ptr, heads, padded_rows, tiles, scale,
    rng_ptr, site, threshold, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SHORT: tl.constexpr,
    PACKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK_Q queries of one (sequence, head): delta, which the next kernel reads, and dQ. Sequences of up to SHORT tokens
    are the one-tile kernel's, but for padding past SHORT."""
    start = tl.program_id(0) % tiles * BLOCK_Q
    sequence = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    first, length, rows = extent(seqlens_ptr, sequence, padded_rows, PACKED)
    if (start >= rows) | ((length <= SHORT) & (start < SHORT)):
        return
    dout_ptr += sequence * dout_batch + first * dout_token + head * dout_head
    q_ptr += sequence * q_batch + first * q_token + head * q_head
    k_ptr += sequence * k_batch + first * k_token + head * k_head
    v_ptr += sequence * v_batch + first * v_token + head * v_head
    out_ptr += sequence * out_batch + first * out_token + head * HEAD_DIM
    dq_ptr += sequence * dx_batch + first * dx_token + head * HEAD_DIM
    row = sequence * lse_batch + head * lse_head + first

    query = start + tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr, start, q_token, length, BLOCK_Q, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, start, dout_token, length, BLOCK_Q, HEAD_DIM, BLOCK_D)
    statistics = row_statistics(
        out_ptr, out_token, lse_ptr + row, dout, start, length, factor, BLOCK_Q, HEAD_DIM, BLOCK_D
    )
    tl.store(delta_ptr + row + query, statistics[1], mask=query < length)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    place = (sequence, head, length, scale, k0, k1, threshold)
    keys = tl.where(start < length, length, 0)  # a tile of padding has none
    for first_key in range(0, keys, BLOCK_K):
        k = load_rows(k_ptr, first_key, k_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, first_key, v_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
        _, ds = tile_gradients(q, k, v, dout, statistics, query, first_key, place, BLOCK_K, True, True, DROPOUT)
        dq = product(ds, k, dq)
    store_rows(dq_ptr, dq * (scale * factor), start, dx_token, rows, HEAD_DIM)


@triton.jit(do_not_specialize=NUMBERS)
def attention_bwd_dkv_kernel(
    dout_ptr, dout_batch, dout_token, dout_head,
    q_ptr, q_batch, q_token, q_head,
    k_ptr, k_batch, k_token, k_head,
    v_ptr, v_batch, v_token, v_head,
    lse_ptr, delta_ptr, lse_batch, lse_head,
    dk_ptr, dv_ptr, dx_batch, dx_token,
    seqlens_ptr, heads, padded_rows, tiles, scale,
    rng_ptr, site, threshold, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SHORT: tl.constexpr,
    PACKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK_K keys of one (sequence, head): dK and dV."""
    start = tl.program_id(0) % tiles * BLOCK_K
    sequence = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    first, length, rows = extent(seqlens_ptr, sequence, padded_rows, PACKED)
    if (start >= rows) | ((length <= SHORT) & (start < SHORT)):
        return
    dout_ptr += sequence * dout_batch + first * dout_token + head * dout_head
    q_ptr += sequence * q_batch + first * q_token + head * q_head
    k_ptr += sequence * k_batch + first * k_token + head * k_head
    v_ptr += sequence * v_batch + first * v_token + head * v_head
    dx = sequence * dx_batch + first * dx_token + head * HEAD_DIM
    row = sequence * lse_batch + head * lse_head + first

    k = load_rows(k_ptr, start, k_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, start, v_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)  # transposed
    dv = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    place = (sequence, head, length, scale, k0, k1, threshold)
    queries = tl.where(start < length, length, 0)  # a tile of padding has none
    for first_query in range(0, queries, BLOCK_Q):
        query = first_query + tl.arange(0, BLOCK_Q)
        q = load_rows(q_ptr, first_query, q_token, length, BLOCK_Q, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, first_query, dout_token, length, BLOCK_Q, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + row + query, mask=query < length, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row + query, mask=query < length, other=0.0)
        dropped, ds = tile_gradients(q, k, v, dout, (lse, delta), query, start, place, BLOCK_K, False, True, DROPOUT)
        dv = product(tl.trans(dout), dropped, dv)
        dk = product(tl.trans(q), ds, dk)
    store_rows(dv_ptr + dx, tl.trans(dv * factor), start, dx_token, rows, HEAD_DIM)
    store_rows(dk_ptr + dx, tl.trans(dk * (scale * factor)), start, dx_token, rows, HEAD_DIM)
