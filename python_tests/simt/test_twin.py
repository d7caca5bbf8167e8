"""The host twin itself: each primitive against the layout figures of the PTX ISA, written out here as tables, and every fault found.

Elements are numbered so that the place an element comes from can be read off the result.
"""

from __future__ import annotations

import numpy as np
import pytest
from simt.twin import SEEDS

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # groupID and threadID_in_group of the figures


def run(twin, name, given, variant=0, seed=0, words=128):
    given = np.ascontiguousarray(given).view(np.uint32).reshape(-1)
    out = np.full(words, 0xDEADBEEF, np.uint32)
    twin.forget()
    twin.set_seed(seed)
    twin.allow(given.ctypes.data, given.nbytes, False, "input")
    twin.allow(out.ctypes.data, out.nbytes, True, "output")
    try:
        twin.probe(name, given.ctypes.data, out.ctypes.data, variant)
    finally:
        twin.forget()
    return out


def pairs(first, second):
    return first.astype(np.uint32) | second.astype(np.uint32) << 16


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(twin, transposed):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)  # [matrix, row, column]
    out = run(twin, "load_matrices", matrices, int(transposed)).reshape(32, 4)
    for i, matrix in enumerate(matrices):
        m = matrix.T if transposed else matrix
        assert np.array_equal(out[:, i], pairs(m[G, 2 * T], m[G, 2 * T + 1]))


def test_transpose_matrix(twin):
    m = np.arange(64, dtype=np.uint16).reshape(8, 8)
    given = np.zeros((32, 4), np.uint32)
    given[:, 0] = pairs(m[G, 2 * T], m[G, 2 * T + 1])
    out = run(twin, "transpose_matrix", given).reshape(32, 4)[:, 0]
    assert np.array_equal(out, pairs(m.T[G, 2 * T], m.T[G, 2 * T + 1]))


def bits(x, dtype):
    """float32 values that the dtype holds exactly, as its bits."""
    return x.astype(np.float16).view(np.uint16) if dtype == "float16" else (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_multiply_add(twin, dtype):
    """Small whole numbers: every product and sum is exact, so one misplaced element changes the result."""
    random = np.random.default_rng(0)
    A, B, C = (random.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = bits(A, dtype), bits(B, dtype)
    # m16n8k16: a0 (g, 2t..) a1 (g+8, 2t..) a2 (g, 2t+8..) a3 (g+8, 2t+8..); b0 (2t.., g) b1 (2t+8.., g)
    given = np.zeros((3, 32, 4), np.uint32)
    for i, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        given[0, :, i] = pairs(a[G + row, 2 * T + column], a[G + row, 2 * T + column + 1])
    for i, row in enumerate([0, 8]):
        given[1, :, i] = pairs(b[2 * T + row, G], b[2 * T + row + 1, G])
    places = [(G, 2 * T), (G, 2 * T + 1), (G + 8, 2 * T), (G + 8, 2 * T + 1)]
    for i, place in enumerate(places):
        given[2, :, i] = C[place].view(np.uint32)
    out = run(twin, f"multiply_add_{dtype}", given).view(np.float32).reshape(32, 4)
    D = A @ B + C
    for i, place in enumerate(places):
        assert np.array_equal(out[:, i], D[place])


@pytest.mark.parametrize("lane", [0, 1, 16, 31])
def test_shuffles_and_votes(twin, lane):
    given = np.zeros((32, 4), np.uint32)
    given[:, 0] = value = np.random.default_rng(lane).integers(0, 2**32, 32, dtype=np.uint32)
    out = run(twin, "shuffle", given, lane).reshape(32, 4)
    assert np.array_equal(out[:, 0], np.full(32, value[lane]))
    assert np.array_equal(out[:, 1], value[LANES ^ lane])
    assert (out[:, 2] == sum(int(v & 1) << i for i, v in enumerate(value))).all() and (out[:, 3] == 1).all()


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -2.5,
    65504.0,
    65519.0,
    65520.0,
    1e-8,
    6e-8,
    2.0**-25,
    3 * 2.0**-25,
    6.1e-5,
    1e30,
    np.inf,
    -np.inf,
]


def test_pack_float16(twin):
    """Against numpy's conversion, which rounds to nearest even: ties, subnormals and overflow among the values."""
    random = np.random.default_rng(1)
    drawn = random.standard_normal(64 - len(SPECIAL)) * 10.0 ** random.integers(-8, 5, 64 - len(SPECIAL))
    given = np.zeros((32, 4), np.float32)
    given[:, :2] = np.concatenate([SPECIAL, drawn]).reshape(32, 2)
    out = run(twin, "pack_float16", given).reshape(32, 4)
    with np.errstate(over="ignore"):
        wanted = given[:, :2].astype(np.float16)
    assert np.array_equal(out[:, 0], pairs(*wanted.view(np.uint16).T))
    assert np.array_equal(out[:, 1:3].copy().view(np.float32), wanted.astype(np.float32))


def test_pack_bfloat16(twin):
    """Round to nearest even on the upper half of the bits, by whole-number arithmetic."""
    random = np.random.default_rng(2)
    given = np.zeros((32, 4), np.float32)
    given[:, 0] = random.standard_normal(32)
    given[:, 1] = (random.integers(0, 2**15, 32) * 2**16 + 2**15).astype(np.uint32).view(np.float32)  # ties
    out = run(twin, "pack_bfloat16", given).reshape(32, 4)
    whole = given[:, :2].copy().view(np.uint32).astype(np.uint64)
    rest, kept = whole % 2**16, whole // 2**16
    kept += (rest > 2**15) | ((rest == 2**15) & (kept % 2 == 1))
    assert np.array_equal(out[:, 0], pairs(kept[:, 0], kept[:, 1]))


def test_functions(twin):
    x = np.linspace(0.1, 20, 32, dtype=np.float32)
    out = run(twin, "functions", x).view(np.float32).reshape(32, 4)
    wide = x.astype(np.float64)
    for i, exact in enumerate((2**wide, np.log2(wide), 1 / wide, wide**-0.5)):
        np.testing.assert_allclose(out[:, i], exact, rtol=2**-22, atol=1e-7)  # 2 ulp; log2 crosses 0


def test_square_root(twin):
    """Rounded to nearest, as numpy's is: perfect squares, subnormals and the largest among the values."""
    random = np.random.default_rng(3)
    given = np.zeros((32, 4), np.float32)
    given[:, :2] = (np.abs(random.standard_normal((32, 2))) * 10.0 ** random.integers(-37, 38, (32, 2))).astype(
        np.float32
    )
    given[:4, 0] = [0.0, 1e-42, 3.4e38, 144.0]
    doubles = np.abs(random.standard_normal(32)) * 10.0 ** random.integers(-300, 300, 32)
    given[:, 2:] = doubles.view(np.float32).reshape(32, 2)
    out = run(twin, "square_root", given).reshape(32, 4)
    assert np.array_equal(out[:, :2].copy().view(np.float32), np.sqrt(given[:, :2]))
    assert np.array_equal(out[:, 2:].copy().view(np.float64)[:, 0], np.sqrt(doubles))


FAULTS = {  # in the order of the enum in csrc/simt/probes.h: what the report must say
    "none": None,
    "no barrier": "wrote with no barrier in between|nobody has written|read with no barrier",
    "no barrier before reuse": "read with no barrier in between|wrote with no barrier in between",
    "no wait": "while an asynchronous copy to it is under way",
    "waits for too few": "while an asynchronous copy to it is under way",
    "no barrier after the wait": "asynchronous copy|no barrier in between|nobody has written",
    "unwritten": "of shared memory, which nobody has written",
    "past shared memory": "past its end",
    "past global memory": "outside everything allowed",
    "writes an input": "which is an input",
    "misaligned": "not aligned",
    "half a warp at a collective": "waits for ever at shuffle|while others of its warp wait at|ends while its warp waits",
    "half a block at a barrier": "waits for ever at|where others came for|while others of its warp",
    "a warp at two barriers": "comes to|waits for ever",
    "a thread leaves early": "ends while its warp waits|waits for ever at",
    "two blocks write one address": "block number [01] wrote with no barrier in between",
    "no warp_sync": "nobody has written|no barrier in between",
    "copies under way at the end": "ends with asynchronous copies under way",
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("seed", SEEDS)
def test_faults(twin, fault, seed):
    given = np.arange(1, 257, dtype=np.uint32)
    variant = list(FAULTS).index(fault)
    if FAULTS[fault]:
        with pytest.raises(RuntimeError, match=rf"^fault: block \(\d, 0, 0\), thread \d+: .*({FAULTS[fault]})"):
            run(twin, "fault", given, variant, seed, words=640)
        return
    out = run(twin, "fault", given, variant, seed, words=640)
    assert np.array_equal(out[:256].reshape(4, 64), given.reshape(4, 64)[:, ::-1])
    copied = np.concatenate([np.where(np.arange(128) < 96, given[:128], 0), given[:128]])
    assert np.array_equal(out[256:384].reshape(64, 2).T.reshape(-1), copied.reshape(2, 128)[:, ::2].reshape(-1))
    assert np.array_equal(out[512:576], copied[:128:2][np.arange(64) ^ 1])
