"""Sums of dz [T, C] by the row of a table that each token reads, without atomics: the same bits each time.

Tokens come sorted by row. A program takes a piece of PIECE of them and COLUMNS columns. What lies whole inside a piece goes to the
gradient; what a piece holds of a row that begins before it (its head) or goes on behind it (its tail) goes to `parts`, and is added up
in the order of the pieces by the piece where the row begins. Rows outside the table, -1 and `rows`, are added up and stored nowhere.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(-2)  # no token has this row


@triton.jit(do_not_specialize=["tokens", "rows"])
def sum_pieces_kernel(
    row_ptr,  # [T] sorted
    token_ptr,  # [T]: which token stands there
    dz_ptr,  # [T, C]
    parts_ptr,  # [pieces, 2, C]: head, tail
    gradient_ptr,  # [rows, C]
    tokens,
    rows,
    C: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,  # loads under way at once
):
    piece = tl.program_id(0).to(tl.int64)
    first, end = piece * PIECE, tl.minimum(piece * PIECE + PIECE, tokens)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    from_before = (piece > 0) & (tl.load(row_ptr + first) == tl.load(row_ptr + tl.maximum(first - 1, 0)))
    total, in_head = tl.zeros((COLUMNS,), tl.float32), from_before
    for start in tl.range(first, end, AHEAD):
        loaded = ()
        for j in tl.static_range(AHEAD):
            token = tl.load(token_ptr + start + j, mask=start + j < end, other=0)
            loaded += (tl.load(dz_ptr + token * C + c, mask=(start + j < end) & (c < C), other=0.0),)
        for j in tl.static_range(AHEAD):
            place = start + j
            here, last = place < end, place + 1 == end
            row = tl.load(row_ptr + place, mask=here, other=NONE)
            before = tl.load(row_ptr + place - 1, mask=here & (place > first), other=NONE)
            after = tl.load(row_ptr + place + 1, mask=place + 1 < tokens, other=NONE)
            begins, ends, goes_on = row != before, here & (last | (row != after)), last & (row == after)
            total = tl.where(begins, loaded[j], total + loaded[j])
            in_head = tl.where(begins, from_before & (place == first), in_head)
            whole = ends & ~in_head & ~goes_on & (row >= 0) & (row < rows)
            value = total.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + row.to(tl.int64) * C + c, value, mask=whole & (c < C))
            part = parts_ptr + (2 * piece + tl.where(in_head, 0, 1)) * C + c
            tl.store(part, total, mask=ends & (in_head | goes_on) & (c < C))


@triton.jit(do_not_specialize=["tokens", "rows"])
def join_pieces_kernel(
    row_ptr,  # [T] sorted
    parts_ptr,  # [pieces, 2, C]
    gradient_ptr,  # [rows, C]
    tokens,
    rows,
    C: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,  # loads under way at once
):
    """For each piece but the last."""
    piece = tl.program_id(0).to(tl.int64)
    first, end = piece * PIECE, piece * PIECE + PIECE
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(row_ptr + end - 1)
    from_before = (piece > 0) & (tl.load(row_ptr + tl.maximum(first - 1, 0)) == row)
    if (tl.load(row_ptr + end) == row) & ~from_before & (row >= 0) & (row < rows):
        heads = tl.zeros((PIECES, COLUMNS), tl.float32)
        at, more = piece + 1, row == row
        while more:
            others = at + tl.arange(0, PIECES)
            same = tl.load(row_ptr + others * PIECE, mask=others * PIECE < tokens, other=NONE) == row
            heads += tl.load(
                parts_ptr + 2 * others[:, None] * C + c[None, :], mask=same[:, None] & (c < C)[None, :], other=0.0
            )
            at += PIECES
            more = tl.load(row_ptr + at * PIECE, mask=at * PIECE < tokens, other=NONE) == row
        tail = tl.load(parts_ptr + (2 * piece + 1) * C + c, mask=c < C, other=0.0)
        value = (tail + tl.sum(heads, 0)).to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row.to(tl.int64) * C + c, value, mask=c < C)
