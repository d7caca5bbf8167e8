"""Dropout masks in Triton: the device functions that the kernels share, bit for bit csrc/common/philox.h and ops/philox.py.

Words are uint32. A row op finds the bytes of 16 consecutive columns in one Philox call; attention finds those of 16 keys of one query
(the order of a tensor-core accumulator; see philox.h).
"""

import triton
import triton.language as tl

from stackbert_kernels.ops._triton import INTERPRETED

if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope) -> None:
        """The interpreter's numbers are arrays [1]. NumPy 2.4 makes no integer of one, so that none could bound a loop."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-7. Words (scalars or blocks that broadcast together) -> four words of one counter each."""
    for _ in tl.static_range(7):
        # 64-bit products of 32-bit words: one IMAD.WIDE each.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def dropout_key(rng_ptr, site):
    """The two key words of a place in the model. rng_ptr -> int64 (seed, step); site in [0, 2^32)."""
    seed = tl.load(rng_ptr).to(tl.uint64)
    step = tl.load(rng_ptr + 1).to(tl.uint64)
    zero = seed * 0
    c0, c1, c2 = step.to(tl.uint32), (step >> 32).to(tl.uint32), (zero + site).to(tl.uint32)
    k0, k1, _, _ = philox(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), c0, c1, c2, zero.to(tl.uint32))
    return k0, k1


@triton.jit
def _bytes_of_words(words):
    """uint32 [R, N] -> its bytes, little-endian: uint32 [R, 4 N]."""
    low = tl.join(words & 0xFF, (words >> 16) & 0xFF)
    high = tl.join((words >> 8) & 0xFF, words >> 24)
    return tl.reshape(tl.join(low, high), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def row_bytes(k0, k1, rows, first, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """uint32 [R, COLUMNS] in 0..255 of the columns first .. first + COLUMNS - 1 of the rows [R] (int64).

    first and COLUMNS are multiples of 16. GROUP: consecutive columns whose bytes one thread makes. 16 draws each Philox call once;
    8 and 4 draw it two and four times, and give each thread just the bytes of a 16-byte load of 2- or 4-byte elements, so that
    nothing is exchanged between threads.
    """
    token = rows[:, None]
    group = first // GROUP + tl.arange(0, COLUMNS // GROUP)[None, :]
    call = (group // (16 // GROUP)).to(tl.uint32)
    zero = tl.zeros_like(token).to(tl.uint32)
    w0, w1, w2, w3 = philox(k0, k1, call, token.to(tl.uint32), (token >> 32).to(tl.uint32), zero)
    if GROUP == 16:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (w0.shape[0], COLUMNS // 4))
    elif GROUP == 8:
        second = group % 2 == 1
        words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))
        words = tl.reshape(words, (w0.shape[0], COLUMNS // 4))
    else:
        number = group % 4
        words = tl.where(number < 2, tl.where(number == 0, w0, w1), tl.where(number == 2, w2, w3))
    return _bytes_of_words(words)


@triton.jit
def attention_kept(k0, k1, sequence, head, queries, first, threshold, KEYS: tl.constexpr):
    """bool [M, KEYS]: what dropout keeps of the keys first .. first + KEYS - 1 (multiples of 64) of the queries [M].

    A Philox call gives the 16 decisions that one lane of a tensor-core accumulator needs for a row of 64 keys. Calls are drawn as
    [M, KEYS / 16] and spread by joins, which in that layout only rename registers: nothing is drawn twice, nothing goes through shared
    memory. The four words enter as one value, because Triton moves a chain of operations into the layout of its one end, but
    exchanges the values where a chain has two.
    """
    call = (first // 16 + tl.arange(0, KEYS // 16)[None, :]).to(tl.uint32)
    query = queries[:, None].to(tl.uint32)
    w0, w1, w2, w3 = philox(k0, k1, call, query, head.to(tl.uint32), sequence.to(tl.uint32))
    low = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    high = w2.to(tl.uint64) | (w3.to(tl.uint64) << 32)
    pairs = tl.join(low, high)
    words = tl.join(pairs, pairs >> 32).to(tl.uint32)  # [M, calls, 2, 2]: word 2 i + j
    # Each byte in turn at the top of a word: what is below it does not change the comparison.
    halves = tl.join(words << 16, words)
    kept = tl.join(halves << 8, halves) >= (threshold.to(tl.uint32) << 24)  # [M, calls, 2, 2, 2, 2]: byte number
    kept = tl.reshape(
        kept, (queries.shape[0], KEYS // 64, 4, 8, 2)
    )  # [M, key / 64, key % 8 / 2, key % 64 / 8, key % 2]
    return tl.reshape(tl.permute(kept, (0, 1, 3, 2, 4)), (queries.shape[0], KEYS))
