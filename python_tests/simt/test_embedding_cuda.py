"""The CUDA embedding on the host: against float64, rows of tables that go on over pieces, indices out of range."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from oracle import assert_as_accurate_as_torch
from simt.twin import SEEDS, Device

from stackbert_kernels.ops import new_rng, philox
from stackbert_kernels.ops.embedding import native, reference

EPS, SITE = 1e-12, 3
RNG = new_rng(2**40 + 7, 2**33 + 5)
INDICES, TABLES = ("ids", "positions", "token_types"), ("word", "position", "token_type")


class Case(NamedTuple):
    tokens: int
    columns: int
    rows: tuple[int, int, int] = (97, 24, 2)
    tables: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    offset: float = 0.0  # |mean| >> std: a one-pass variance loses its digits here


# Columns choose the kernel: rows of one warp and of several, in vectors and one by one. 64 tokens are a piece.
CASES = [
    Case(1, 1, (1, 1, 1)),
    Case(70, 37, offset=30.0),
    Case(64, 40),
    Case(200, 40, (3, 5, 2), tables=torch.bfloat16, dtype=torch.bfloat16),
    Case(200, 33, (3, 5, 1), tables=torch.float16, dtype=torch.float16),
    Case(700, 8, (1, 40000, 2)),  # a table of one row
    Case(30, 768, dtype=torch.bfloat16),
    Case(9, 1024, dtype=torch.float16),
    Case(3, 1544, tables=torch.bfloat16, dtype=torch.float32),
    Case(2, 1033),
    Case(1, 4096),
]


def problem(case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(case.tokens + case.columns)
    t = {n: torch.randint(0, rows, (case.tokens,)) for n, rows in zip(INDICES, case.rows, strict=True)}
    t["ids"][torch.rand(case.tokens) < 0.3] = case.rows[0] // 2  # a frequent word, as [MASK] is
    t |= {
        n: (torch.randn(r, case.columns) + case.offset).to(case.tables) for n, r in zip(TABLES, case.rows, strict=True)
    }
    return t | {"weight": torch.randn(case.columns), "bias": torch.randn(case.columns), "rng": RNG}


def run(twin, seed, t, dy, threshold):
    """y, dword, dposition, dtoken_type, dweight, dbias"""
    with Device(twin, seed, t | {"dy": dy}):
        *inputs, rng = t.values()
        y, mean, rstd = native.embedding_layer_norm_fwd_cuda(*inputs, rng, SITE, threshold, EPS, dy.dtype)
        again = native.embedding_layer_norm_forward_only_cuda(*inputs, rng, SITE, threshold, EPS, dy.dtype)
        gradients = native.embedding_layer_norm_bwd_cuda(dy, *inputs, mean, rstd, rng, SITE, threshold)
    assert torch.equal(y.nan_to_num(7.0), again.nan_to_num(7.0))
    return y, *gradients


def by_reference(t, dy, threshold, dtype=None):
    inputs = [x if dtype is None or not x.is_floating_point() else x.to(dtype) for x in list(t.values())[:-1]]
    y, mean, rstd = reference.embedding_layer_norm_fwd(*inputs, RNG, SITE, threshold, EPS, dtype or dy.dtype)
    dy = dy if dtype is None else dy.to(dtype)
    return y, *reference.embedding_layer_norm_bwd(dy, *inputs, mean, rstd, RNG, SITE, threshold)


@pytest.mark.parametrize("threshold", [0, 26])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.tokens}x{c.columns}-{c.rows[0]}")
def test_forward_and_backward(twin, case, threshold):
    t = problem(case)
    dy = torch.randn(case.tokens, case.columns).to(case.dtype)
    seeds = SEEDS if case.tokens * case.columns < 4000 and threshold else SEEDS[:2]
    seen = [run(twin, seed, t, dy, threshold) for seed in seeds]
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    exact, baseline = by_reference(t, dy, threshold, torch.float64), by_reference(t, dy, threshold)
    for name, a, e, b in zip(("y", *TABLES, "weight", "bias"), seen[0], exact, baseline, strict=True):
        assert a.dtype == b.dtype
        slack = 2.0 if name == "y" else 3.0
        # One column: gradients are exactly zero but for what cancels.
        assert_as_accurate_as_torch(name, a, e, b, slack) if case.columns > 1 else torch.testing.assert_close(a, b)
    for name, gradient, index in zip(TABLES, seen[0][1:4], INDICES, strict=True):
        unread = torch.ones(len(t[name]), dtype=torch.bool).index_fill(0, t[index], False)
        assert not gradient[unread].any()


@pytest.mark.parametrize("columns", [37, 768])
def test_masks_are_those_of_the_reference(twin, columns):
    """weight 0 and bias 1 make the output the mask itself; with dy = 1 the gradient of bias counts what backward kept."""
    t = problem(Case(20, columns))
    t["weight"], t["bias"] = torch.zeros(columns), torch.ones(columns)
    y, *_, dbias = run(twin, 0, t, torch.ones(20, columns), 26)
    want = philox.row_factors(RNG, SITE, 26, y)
    assert torch.equal(y, want)
    torch.testing.assert_close(dbias / philox.scale(26), (want != 0).sum(0).float())


@pytest.mark.parametrize(
    "ids",
    [
        [5] * 200,  # one row over all pieces
        [0, 1] * 64,
        [7] * 64 + [3] * 64 + [9] * 64,  # rows that end where a piece does
        [7] * 65 + [3] * 64 + [9] * 65,
        [4] * 3 + [6] * 190 + [4] * 2,
        [2] * 64,  # a single piece
    ],
    ids=range(6),
)
@pytest.mark.parametrize("columns", [8, 7])
def test_rows_over_the_borders_of_pieces(twin, ids, columns):
    sums_of_rows(twin, ids, columns)


def test_a_row_over_more_pieces_than_a_block_reads_at_once(twin):
    sums_of_rows(twin, [5] * 4300, 8)


def sums_of_rows(twin, ids, columns):
    t = problem(Case(len(ids), columns, (40, 24, 2)))
    t["ids"] = torch.tensor(ids)
    dy = torch.randn(len(ids), columns)
    got, exact, baseline = run(twin, 1, t, dy, 0), by_reference(t, dy, 0, torch.float64), by_reference(t, dy, 0)
    for name, a, e, b in zip(TABLES, got[1:4], exact[1:4], baseline[1:4], strict=True):
        assert_as_accurate_as_torch(name, a, e, b, 3.0)


@pytest.mark.parametrize("value", [-1, 30, 2**32, -(2**63)])
@pytest.mark.parametrize("place", range(3))
def test_an_index_out_of_range_gives_a_row_of_nan(twin, place, value):
    """No memory is read for it, no other token notices, and no row of that table gets its gradient."""
    t = problem(Case(70, 40, (30, 30, 30)))
    dy = torch.ones(70, 40)
    good = run(twin, 0, t, dy, 128)
    t[INDICES[place]][2] = value
    y, *gradients = run(twin, 1, t, dy, 128)
    rest = torch.arange(70) != 2
    assert y[2].isnan().all() and torch.equal(y[rest], good[0][rest])
    assert gradients[place].isfinite().all()
    assert gradients[(place + 1) % 3].isnan().any()


def test_no_tokens(twin):
    t = problem(Case(0, 40))
    y, *gradients = run(twin, 0, t, torch.ones(0, 40), 26)
    assert y.shape == (0, 40) and not any(g.any() for g in gradients)
