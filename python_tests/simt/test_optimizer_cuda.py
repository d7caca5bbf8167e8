"""The CUDA AdamW and global norm on the host: against float64, at any address, under several schedules, and what a skipped step leaves alone."""

from __future__ import annotations

import pytest
import torch
from optimizer_regions import HYPER, Regions, assert_norm, assert_within, bounds, norm_tensors, regions, same, stepped
from simt.twin import SEEDS, Device

from stackbert_kernels.ops.optimizer import native, segments

BLOCK = native.BLOCK
GUARD = 24  # elements around each tensor


class Placed:
    """Regions that the kernel may write, each tensor between guards, `shift` elements behind a 16-byte address."""

    def __init__(self, r: Regions, shift: int, copies: bool):
        self.buffers = []
        lists = [[self.place(t, shift) for t in tensors] for tensors in r.lists()[:-1]]
        self.regions = Regions(*lists, r.decay)
        self.copies = [self.place(torch.zeros_like(w, dtype=torch.bfloat16), shift) for w in r.weights if copies]

    def place(self, t: torch.Tensor, shift: int) -> torch.Tensor:
        buffer = torch.empty(t.numel() + 2 * GUARD, dtype=t.dtype)  # NaN
        part = slice(GUARD + shift, GUARD + shift + t.numel())
        self.buffers.append((buffer, part))
        return buffer[part].view(t.shape).copy_(t)

    def guarded(self) -> bool:
        return all(b[: part.start].isnan().all() and b[part.stop :].isnan().all() for b, part in self.buffers)


def forget_tables() -> None:
    """Those that an earlier device had."""
    for kept in (
        segments._table,
        segments._lines,
        segments._norm_table,
        segments._part_table,
        segments._part_lines,
    ):
        kept.cache_clear()


def run(twin, seed, r, shift=0, copies=False, *, skipped=None, norm=None, scale=None, found_inf=None, max_norm=0.0):
    """A step on the twin, on copies of `r`."""
    forget_tables()
    scalars = {"norm": norm, "scale": scale, "found_inf": found_inf}
    scalars = {name: None if s is None else torch.tensor(s) for name, s in scalars.items()}
    numbers = [*HYPER.values(), max_norm]
    with Device(twin, seed, scalars):
        placed = Placed(r, shift, copies)
        counted = None if skipped is None else torch.tensor(skipped)
        native.adamw_cuda_(
            *placed.regions.lists()[:-1], placed.copies, counted, r.decay, list(scalars.values()), numbers
        )
        assert placed.guarded()
    return placed.regions, placed.copies, counted


def large() -> Regions:
    """Whole blocks and ends of tensors, rows that begin on no 16 bytes, a decay that ends inside a vector."""
    shapes = [(2, 2 * BLOCK), (2, BLOCK + 37), (BLOCK,), (), (2, 0), (0, 3)]
    steps = [torch.tensor([0.0, 70.0]), torch.tensor([9.0, 1.0]), torch.tensor(3.0), torch.tensor(0.0), torch.zeros(2), torch.zeros(0)]  # fmt: skip
    kinds = [[torch.randn(s) for s in shapes] for _ in range(4)]
    kinds[3] = [v.square() for v in kinds[3]]
    return Regions(*kinds, steps, [BLOCK + 6, 5, 2, 0, 0, 0])


@pytest.mark.parametrize("copies", [False, True], ids=["", "copies"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("make", [regions, large])
def test_matches_float64(twin, make, shift, copies):
    r = make()
    exact, norm = stepped(r.clone(torch.float64), "reference"), 3.0
    seen = []
    for seed in SEEDS if make is regions else SEEDS[:2]:
        after, rounded, _ = run(twin, seed, r, shift, copies, norm=norm)
        seen.append(after)
        assert all(torch.equal(c, w.bfloat16()) for c, w in zip(rounded, after.weights, strict=copies))
    assert_within(seen[0], exact, bounds(r))
    assert all(same(other, seen[0]) for other in seen[1:])


def test_clipping_and_scale(twin):
    r, norm, scale, max_norm = regions(), 8.0, 0.25, 0.5
    options = {"norm": torch.tensor(norm), "scale": torch.tensor(scale), "max_norm": max_norm}
    exact = stepped(r.clone(torch.float64), "reference", **options)
    after, _, skipped = run(twin, 0, r, norm=norm, scale=scale, max_norm=max_norm, skipped=[2.0, 2.0])
    assert_within(
        after, exact, bounds(r, factor=scale * max_norm / (norm * scale)), slack=1.5
    )  # the factor's own roundings
    assert skipped.tolist() == [2, 0]
    for generous in (0.0, 100.0):  # no clipping
        assert same(run(twin, 1, r, norm=norm, max_norm=generous)[0], run(twin, 2, r)[0])


@pytest.mark.parametrize(
    "why",
    [{"norm": torch.inf}, {"norm": -torch.inf}, {"norm": torch.nan}, {"norm": 1.0, "scale": torch.inf}, {"found_inf": 1.0},
     {"norm": 1.0, "found_inf": torch.nan}], ids=str)  # fmt: skip
def test_a_skipped_step_changes_nothing_but_the_count(twin, why):
    r = regions()
    r.grads[0][1, 3] = torch.nan
    after, copies, skipped = run(twin, 3, r, copies=True, skipped=[3.0, 1.0], max_norm=1.0, **why)
    assert same(after, r) and not any(c.any() for c in copies)
    assert skipped.tolist() == [4, 2]


def test_many_rows_count_apart(twin):
    r = Regions(*([torch.randn(70, 3)] for _ in range(4)), [torch.arange(70.0) ** 2], [2])
    r.exp_avg_sq[0].abs_()
    assert_within(run(twin, 0, r)[0], stepped(r.clone(torch.float64), "reference"), bounds(r))


def test_a_table_for_other_blocks_is_refused(twin):
    addresses = dict.fromkeys(("table", "lines", "factors"), 64)
    options = dict.fromkeys(("norm", "scale", "found_inf", "skipped"), 0) | HYPER | {"max_norm": 0.0}
    with pytest.raises(ValueError, match="must be made for 2048 elements a block, got 1024"):
        twin.adamw_cuda(**addresses, rows=1, blocks=1, elements=1024, **options, device=0, stream=0)


def norm_on(twin, seed, tensors):
    forget_tables()
    with Device(twin, seed, {str(i): t for i, t in enumerate(tensors)}):
        return native.global_norm_cuda(tensors)


@pytest.mark.parametrize("block", [7, native.NORM_BLOCK])
def test_global_norm(twin, block):
    tensors = norm_tensors(block)
    norms = [norm_on(twin, seed, tensors) for seed in (SEEDS if block == 7 else SEEDS[:2])]
    assert_norm(norms[0], tensors)
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    for part in ([tensors[0]], [tensors[4]], tensors[3:]):  # those whose squares the largest hide
        assert_norm(norm_on(twin, 0, part), part)


@pytest.mark.parametrize("place", [0, native.NORM_BLOCK - 1, native.NORM_BLOCK + 4])
def test_global_norm_tells_what_is_not_finite(twin, place):
    for value in (torch.inf, torch.nan):
        x = torch.ones(native.NORM_BLOCK + 5)
        x[place] = value
        assert not norm_on(twin, 0, [torch.ones(3), x]).isfinite()
