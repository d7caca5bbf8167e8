"""Attention's forward kernels in Triton, and what the backward kernels share with them.

B sequences, T tokens, S longest, H heads, D head dimension. A program does one (sequence, head), or a tile of its queries. Packed tensors
come with cu_seqlens [B + 1] and a batch stride of 0, padded ones with lengths [B]; `first` is the sequence's first token, `length` its
tokens, `rows` how many rows of a result are written: the length, or all S of a padded one, where rows past the length are zero. Nothing past
the length is read. Tile loops end with the length, so that a program's work is that of its own sequence.
"""

import triton
import triton.language as tl

from stackbert_kernels.ops._triton_language import attention_kept, dropout_key

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # finite: -inf - -inf is NaN where there is no key
# Arguments of which 1 and multiples of 16 are nothing special: no kernel is compiled again for them.
NUMBERS = ("lse_batch", "lse_head", "heads", "padded_rows", "tiles", "scale", "site", "threshold", "factor")


@triton.jit
def extent(seqlens_ptr, sequence, padded_rows, PACKED: tl.constexpr):
    """(first, length, rows) of a sequence."""
    if PACKED:
        first = tl.load(seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(seqlens_ptr + sequence + 1) - first).to(tl.int32)
        rows = length
    else:
        first = sequence * 0
        length = tl.load(seqlens_ptr + sequence)
        rows = padded_rows
    return first, length, rows


@triton.jit
def _tile(start, token_stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(offsets, mask) of the rows start .. start + ROWS - 1 of one head. A tile is less than 2^31 elements across (the launch sees to it),
    so that only its first row needs 64 bits."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (start + row < limit)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (d < HEAD_DIM)[None, :]
    return row[:, None] * token_stride + d[None, :], inside


@triton.jit
def load_rows(ptr, start, token_stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] of one head; zeros, and nothing read, from row `limit` and from column HEAD_DIM on."""
    offsets, inside = _tile(start, token_stride, limit, ROWS, HEAD_DIM, BLOCK_D)
    first = (tl.zeros([], tl.int64) + start) * token_stride
    return tl.load(ptr + first + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, x, start, token_stride, limit, HEAD_DIM: tl.constexpr):
    offsets, inside = _tile(start, token_stride, limit, x.shape[0], HEAD_DIM, x.shape[1])
    first = (tl.zeros([], tl.int64) + start) * token_stride
    tl.store(ptr + first + offsets, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, total=None):
    """a b, added to total. fp32 is not rounded to tf32: nobody trains BERT in it, it is there to be right."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def scaled_scores(q, k, scale, POSITIVE: tl.constexpr):
    """(scores, exponent) such that exp(q k^T * scale) = 2^(scores * exponent) and the exponent is positive. A positive scale is left to the
    exponent, where its product and the subtraction of the row's largest are one instruction."""
    scores = product(q, tl.trans(k))
    exponent = scale * 0.0 + LOG2E
    if POSITIVE:
        exponent = scale * LOG2E
    else:
        scores = scores * scale
    return scores, exponent


@triton.jit(do_not_specialize=NUMBERS)
def attention_fwd_one_tile_kernel(
    q_ptr, q_batch, q_token, q_head,
    k_ptr, k_batch, k_token, k_head,
    v_ptr, v_batch, v_token, v_head,
    out_ptr, out_batch, out_token,
    lse_ptr, lse_batch, lse_head,
    seqlens_ptr, heads, padded_rows, scale,
    rng_ptr, site, threshold, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, DROPOUT: tl.constexpr, WITH_LSE: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """A program does one (sequence, head) of up to BLOCK_K keys: they are read once, and the softmax of a row is seen whole."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first, length, rows = extent(seqlens_ptr, sequence, padded_rows, PACKED)
    q_ptr += sequence * q_batch + first * q_token + head * q_head
    k_ptr += sequence * k_batch + first * k_token + head * k_head
    v_ptr += sequence * v_batch + first * v_token + head * v_head
    out_ptr += sequence * out_batch + first * out_token + head * HEAD_DIM
    lse_ptr += sequence * lse_batch + head * lse_head + first

    key = tl.arange(0, BLOCK_K)
    k = load_rows(k_ptr, 0, k_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, 0, v_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for start in range(0, rows, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        q = load_rows(q_ptr, start, q_token, length, BLOCK_Q, HEAD_DIM, BLOCK_D)
        scores, exponent = scaled_scores(q, k, scale, POSITIVE)
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        largest = tl.maximum(tl.max(scores, 1) * exponent, LOWEST)
        p = tl.exp2(scores * exponent - largest[:, None])
        total = tl.sum(p, 1)
        if DROPOUT:
            kept = attention_kept(k0, k1, sequence, head, query, 0, threshold, BLOCK_K)
            p = tl.where(
                kept, p, scale * 0.0
            )  # no constant: LLVM would select after packing to 16 bits, unpacking for it
        inverse = tl.where(query < length, factor / total, 0.0)
        out = product(p.to(v.dtype), v) * inverse[:, None]
        store_rows(out_ptr, out, start, out_token, rows, HEAD_DIM)
        if WITH_LSE:
            lse = tl.where(query < length, (largest + tl.log2(total)) * LN2, 0.0)
            tl.store(lse_ptr + query, lse, mask=query < rows)


@triton.jit(do_not_specialize=NUMBERS)
def attention_fwd_kernel(
    q_ptr, q_batch, q_token, q_head,
    k_ptr, k_batch, k_token, k_head,
    v_ptr, v_batch, v_token, v_head,
    out_ptr, out_batch, out_token,
    lse_ptr, lse_batch, lse_head,
    seqlens_ptr, heads, padded_rows, tiles, scale,
    rng_ptr, site, threshold, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, DROPOUT: tl.constexpr, WITH_LSE: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK_Q queries of one (sequence, head) by the online softmax. Those of one head run side by side and share its
    keys in the L2 cache."""
    start = tl.program_id(0) % tiles * BLOCK_Q
    sequence = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    first, length, rows = extent(seqlens_ptr, sequence, padded_rows, PACKED)
    if start >= rows:
        return
    q_ptr += sequence * q_batch + first * q_token + head * q_head
    k_ptr += sequence * k_batch + first * k_token + head * k_head
    v_ptr += sequence * v_batch + first * v_token + head * v_head
    out_ptr += sequence * out_batch + first * out_token + head * HEAD_DIM
    lse_ptr += sequence * lse_batch + head * lse_head + first

    query = start + tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr, start, q_token, length, BLOCK_Q, HEAD_DIM, BLOCK_D)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    keys = tl.where(start < length, length, 0)  # a tile of padding has none
    for first_key in range(0, keys, BLOCK_K):
        key = first_key + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, first_key, k_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, first_key, v_token, length, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores, exponent = scaled_scores(q, k, scale, POSITIVE)
        if first_key + BLOCK_K > length:
            scores = tl.where((key < length)[None, :], scores, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1) * exponent)
        p = tl.exp2(scores * exponent - largest[:, None])
        rescale = tl.exp2(before - largest)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            kept = attention_kept(k0, k1, sequence, head, query, first_key, threshold, BLOCK_K)
            p = tl.where(
                kept, p, scale * 0.0
            )  # no constant: LLVM would select after packing to 16 bits, unpacking for it
        out = product(p.to(v.dtype), v, out * rescale[:, None])
    inside = query < length
    store_rows(out_ptr, out * tl.where(inside, factor / total, 0.0)[:, None], start, out_token, rows, HEAD_DIM)
    if WITH_LSE:
        tl.store(lse_ptr + query, tl.where(inside, (largest + tl.log2(total)) * LN2, 0.0), mask=query < rows)
