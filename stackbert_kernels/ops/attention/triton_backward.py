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
from stackbert_kernels.ops.attention.triton_forward import LOG2E, NUMBERS, extent, load_rows, store_rows


@triton.jit
def tile_gradients(
    q, k, v, dout, lse, delta, length, sequence, head, query, first_key, scale, k0, k1, threshold,
    BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M P, dS) of a tile, without the factors 1 / keep rate and scale. lse is that of base 2, delta divided by 1 / keep rate."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
    if first_key + BLOCK_K > length:
        # Keys past the length are zeros, yet their p is not, and may be infinite: infinity * 0 in dQ.
        p = tl.where((first_key + tl.arange(0, BLOCK_K) < length)[None, :], p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        kept = attention_kept(k0, k1, sequence, head, query, first_key, threshold, BLOCK_K)
        dropped = tl.where(kept, p, scale * 0.0)
        dp = tl.where(kept, dp, 0.0)
    return dropped.to(q.dtype), (p * (dp - delta[:, None])).to(q.dtype)


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
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program does one (sequence, head) of up to BLOCK_Q tokens; of longer ones, which are the other kernels', nothing."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first, length, rows = extent(seqlens_ptr, sequence, padded_rows, PACKED)
    if length > BLOCK_Q:
        return
    dout_ptr += sequence * dout_batch + first * dout_token + head * dout_head
    q_ptr += sequence * q_batch + first * q_token + head * q_head
    k_ptr += sequence * k_batch + first * k_token + head * k_head
    v_ptr += sequence * v_batch + first * v_token + head * v_head
    out_ptr += sequence * out_batch + first * out_token + head * HEAD_DIM
    lse_ptr += sequence * lse_batch + head * lse_head + first
    dx = sequence * dx_batch + first * dx_token + head * HEAD_DIM
    rows = tl.minimum(rows, BLOCK_Q)

    query = tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr, query, q_token, length, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, query, dout_token, length, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, query, out_token, length, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + query, mask=query < length, other=0.0) * LOG2E
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) / factor
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for start in range(0, rows, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, key, k_token, length, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, key, v_token, length, HEAD_DIM, BLOCK_D)
        dropped, ds = tile_gradients(
            q, k, v, dout, lse, delta, length, sequence, head, query, start, scale, k0, k1, threshold,
            BLOCK_K, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(dropped), dout, input_precision=PRECISION) * factor
        store_rows(dv_ptr + dx, dv, key, dx_token, rows, HEAD_DIM, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * (scale * factor)
        store_rows(dk_ptr + dx, dk, key, dx_token, rows, HEAD_DIM, BLOCK_D)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + dx, dq * (scale * factor), query, dx_token, rows, HEAD_DIM, BLOCK_D)


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
    PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
    q = load_rows(q_ptr, query, q_token, length, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, query, dout_token, length, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, query, out_token, length, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + row + query, mask=query < length, other=0.0) * LOG2E
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) / factor
    tl.store(delta_ptr + row + query, delta, mask=query < length)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    keys = tl.where(start < length, length, 0)  # a tile of padding has none
    for first_key in range(0, keys, BLOCK_K):
        key = first_key + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, key, k_token, length, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, key, v_token, length, HEAD_DIM, BLOCK_D)
        _, ds = tile_gradients(
            q, k, v, dout, lse, delta, length, sequence, head, query, first_key, scale, k0, k1, threshold,
            BLOCK_K, DROPOUT, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_rows(dq_ptr, dq * (scale * factor), query, dx_token, rows, HEAD_DIM, BLOCK_D)


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
    PACKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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

    key = start + tl.arange(0, BLOCK_K)
    k = load_rows(k_ptr, key, k_token, length, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, key, v_token, length, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    queries = tl.where(start < length, length, 0)  # a tile of padding has none
    for first_query in range(0, queries, BLOCK_Q):
        query = first_query + tl.arange(0, BLOCK_Q)
        q = load_rows(q_ptr, query, q_token, length, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, query, dout_token, length, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + row + query, mask=query < length, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row + query, mask=query < length, other=0.0)
        dropped, ds = tile_gradients(
            q, k, v, dout, lse, delta, length, sequence, head, query, start, scale, k0, k1, threshold,
            BLOCK_K, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(dropped), dout, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    store_rows(dv_ptr + dx, dv * factor, key, dx_token, rows, HEAD_DIM, BLOCK_D)
    store_rows(dk_ptr + dx, dk * (scale * factor), key, dx_token, rows, HEAD_DIM, BLOCK_D)
