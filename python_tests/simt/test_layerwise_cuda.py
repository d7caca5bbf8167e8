"""The CUDA LAMB and LANS on the host: against float64, at any address, under several schedules, and what a skipped step leaves alone."""

from __future__ import annotations

import pytest
import torch
from layerwise_regions import OPS, assert_within, bounds, parts_of, same, stepped
from optimizer_regions import HYPER, Regions, regions
from simt.test_optimizer_cuda import Placed, forget_tables
from simt.twin import SEEDS, Device

from stackbert_kernels.ops.optimizer import native

BLOCK = native.PART_BLOCK
FUNCTIONS = {"lamb_": native.lamb_cuda_, "lans_": native.lans_cuda_}
BOTH = pytest.mark.parametrize("op", OPS)


def run(
    twin, seed, op, r, shift=0, copies=False, *, skipped=None, norm=None, scale=None, found_inf=None, max_norm=0.0, parts=None
):  # fmt: skip
    """A step on the twin, on copies of `r`."""
    forget_tables()
    scalars = {"norm": norm, "scale": scale, "found_inf": found_inf}
    scalars = {name: None if s is None else torch.tensor(s) for name, s in scalars.items()}
    flat = [size for row in parts or parts_of(r) for size in row]
    with Device(twin, seed, scalars):
        placed = Placed(r, shift, copies)
        counted = None if skipped is None else torch.tensor(skipped)
        FUNCTIONS[op](
            *placed.regions.lists()[:-1], placed.copies, counted, r.decay, flat, list(scalars.values()), [*HYPER.values(), max_norm]
        )  # fmt: skip
        assert placed.guarded()
    return placed.regions, placed.copies, counted


def large() -> Regions:
    """Parts of whole blocks and ends, two of which a block sees at most; parts that begin on no 16 bytes; nothing at all."""
    shapes = [(2, 3 * BLOCK), (2, BLOCK + 37), (), (2, 0), (0, 3)]
    steps = [torch.tensor([0.0, 70.0]), torch.tensor([9.0, 1.0]), torch.tensor(0.0), torch.zeros(2), torch.zeros(0)]
    kinds = [[torch.randn(s) for s in shapes] for _ in range(4)]
    kinds[3] = [v.square() for v in kinds[3]]
    return Regions(*kinds, steps, [3 * BLOCK, 6, 0, 0, 0])


@BOTH
@pytest.mark.parametrize(("shift", "copies"), [(0, True), (1, False)])
@pytest.mark.parametrize("make", [regions, large])
def test_matches_float64(twin, op, make, shift, copies):
    r = make()
    exact, seen = stepped(op, r.clone(torch.float64), "reference"), []
    for seed in SEEDS if make is regions else SEEDS[:2]:
        after, rounded, _ = run(twin, seed, op, r, shift, copies, norm=3.0)
        seen.append(after)
        assert all(torch.equal(c, w.bfloat16()) for c, w in zip(rounded, after.weights, strict=copies))
    assert_within(seen[0], exact, bounds(op, r))
    assert all(same(other, seen[0]) for other in seen[1:])


def test_a_part_of_more_blocks_than_threads_add_up(twin, op="lans_"):
    """Two threads of a part's last sum have several blocks; a weight far from the others' in the last of them."""
    size = 257 * BLOCK + 5
    r = Regions(*([torch.rand(1, size) + 0.5] for _ in range(4)), [torch.tensor([3.0])], [size])
    r.weights[0][0, -3] = 5e4
    r.grads[0][0, -2] = 5e4
    parts = [[size]]
    after, _, _ = run(twin, 0, op, r, parts=parts)
    exact = r.clone(torch.float64)
    OPS[op](*exact.lists(), parts, impl="reference", **HYPER)
    wrong = (after.weights[0].double() - exact.weights[0]).abs() / (exact.weights[0] - r.weights[0]).abs()
    assert wrong[0, :100].max() < 1e-4  # a block left out changes a ratio by more


@BOTH
def test_clipping_and_scale(twin, op):
    r, norm, scale = regions(), 8.0, 0.25
    max_norm = 0.5 if op == "lamb_" else 0.0
    options = {"norm": torch.tensor(norm), "scale": torch.tensor(scale)} | ({"max_norm": max_norm} if max_norm else {})
    exact = stepped(op, r.clone(torch.float64), "reference", **options)
    after, _, skipped = run(twin, 0, op, r, norm=norm, scale=scale, max_norm=max_norm, skipped=[2.0, 2.0])
    factor = scale * max_norm / (norm * scale) if max_norm else scale
    assert_within(after, exact, bounds(op, r, factor, more=3))
    assert skipped.tolist() == [2, 0]


@BOTH
@pytest.mark.parametrize(
    "why",
    [{"norm": torch.inf}, {"norm": torch.nan}, {"norm": 1.0, "scale": torch.inf}, {"found_inf": 1.0},
     {"norm": 1.0, "found_inf": torch.nan}], ids=str)  # fmt: skip
def test_a_skipped_step_changes_nothing_but_the_count(twin, op, why):
    r = regions()
    r.grads[0][1, 3] = torch.nan
    after, copies, skipped = run(twin, 3, op, r, copies=True, skipped=[3.0, 1.0], **why)
    assert same(after, r) and not any(c.any() for c in copies)
    assert skipped.tolist() == [4, 2]


@BOTH
def test_zeros(twin, op):
    """Of a gradient, of a part's weights, of everything: ratios of 1, and no NaN."""
    r = regions()
    r.grads[1].zero_()
    r.weights[0][0].zero_()
    for tensors in r.lists()[:4]:
        tensors[0][2].zero_()
    exact = stepped(op, r.clone(torch.float64), "reference")
    after, _, _ = run(twin, 0, op, r)
    assert_within(after, exact, bounds(op, r))
    assert not after.weights[0][2].any()


@BOTH
def test_a_table_for_other_blocks_is_refused(twin, op):
    addresses = dict.fromkeys(("table", "lines", "factors", "partials"), 64)
    options = dict.fromkeys(("norm", "scale", "found_inf", "skipped"), 0) | HYPER | {"max_norm": 0.0}
    with pytest.raises(ValueError, match=f"{op}: the table must be made for 2048 elements a block, got 1024"):
        getattr(twin, f"{op}cuda")(**addresses, parts=1, blocks=1, elements=1024, **options, device=0, stream=0)
