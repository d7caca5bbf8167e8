"""lamb_ and lans_: steps worked out by hand, the checks of the papers' formulas, float64 with a bound counted from them, and what must
not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from layerwise_regions import OPS, assert_within, bounds, parts_of, same, stepped
from optimizer_regions import HYPER, Regions, regions

from stackbert_kernels import ops
from stackbert_kernels.ops import _triton
from stackbert_kernels.ops._library import _C
from stackbert_kernels.ops.optimizer.op import _lamb_, _lans_

IMPLS = ("reference", "native")
ISAS = ["generic", "avx2", "avx512"]
BOTH = pytest.mark.parametrize("op", OPS)
each_impl = pytest.mark.parametrize("impl", IMPLS)
any_impl = pytest.mark.parametrize("impl", (*IMPLS, "triton"))  # which is interpreted: little of it


class Pair:
    """A parameter of two elements, (3, 4) at first."""

    def __init__(self, impl: str, dtype: torch.dtype = torch.float32, start=(3.0, 4.0)):
        self.impl, self.w = impl, torch.tensor(start, dtype=dtype)
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros_like(self.w), torch.zeros(())

    def step(self, op: str, gradient, **changes) -> torch.Tensor:
        options = {"lr": 0.01, "weight_decay": 0.01, "eps": 1e-6} | changes
        g = torch.tensor(gradient, dtype=self.w.dtype)
        OPS[op]([self.w], [g], [self.m], [self.v], [self.t], [2], impl=self.impl, **options)
        return self.w


def close(actual: torch.Tensor, wanted, digits: float = 5e-9) -> None:
    """`digits`: half a unit of the last digit that `wanted` gives; float32 adds a rounding or a few."""
    wanted = torch.tensor(wanted, dtype=torch.float64)
    few = 8 * torch.finfo(actual.dtype).eps
    assert ((actual.double() - wanted).abs() <= digits + few * wanted.abs()).all(), f"{actual.tolist()}"


EXACT = [("reference", torch.float64), *((impl, torch.float32) for impl in (*IMPLS, "triton"))]
exactly = pytest.mark.parametrize(("impl", "dtype"), EXACT)


# --- worked out by hand ---


@exactly
def test_three_steps_of_lans(impl, dtype):
    p = Pair(impl, dtype)
    close(p.step("lans_", (0.6, 0.8)), (2.96481588, 3.96447427))
    close(p.m, (0.05999994, 0.07999992))
    close(p.v, (0.00036, 0.00064), digits=5e-9)
    close(p.step("lans_", (1.0, -2.0)), (2.9171304, 3.97123503))
    close(p.step("lans_", (-0.5, 0.1)), (2.93495719, 3.92770981))


@exactly
def test_two_steps_of_lamb(impl, dtype):
    """First m / D = (1, 1) but for eps, r = (1.03, 1.04) of norm sqrt(2.1425), ratio 5 / 1.463728. Then m = (0.154,
    -0.128), v = (0.00135964, 0.00463936); m / (1 - 0.81) = (0.81052632, -0.67368421), D = (0.82471818, 1.52343049), r = (1.01243883,
    -0.40257023), ratio 4.95047366 / 1.08953897."""
    p = Pair(impl, dtype)
    close(p.step("lamb_", (0.6, 0.8)), (2.96481588, 3.96447427))
    close(p.m, (0.06, 0.08))
    close(p.v, (0.00036, 0.00064))
    close(p.step("lamb_", (1.0, -2.0)), (2.91881429, 3.98276561))
    close(p.m, (0.154, -0.128))
    close(p.v, (0.00135964, 0.00463936))


@each_impl
def test_the_first_step_of_lans_does_not_see_the_gradients_length(impl):
    one = Pair(impl).step("lans_", (0.6, 0.8))
    for gradient in ((60.0, 80.0), (6e-3, 8e-3)):
        other = Pair(impl).step("lans_", gradient)
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    scaled = Pair(impl).step("lans_", (0.6, 0.8), scale=torch.tensor(100.0))
    torch.testing.assert_close(scaled, one, rtol=0, atol=1e-6)


@each_impl
def test_without_beta1_lans_follows_the_gradient_alone(impl):
    """Whatever the mean was, the step is lr |p| along c."""
    p = Pair(impl, torch.float64 if impl == "reference" else torch.float32)
    p.m.fill_(123.0)
    before = p.w.double().clone()
    p.step("lans_", (0.6, 0.8), beta1=0.0)
    g = torch.tensor([0.6, 0.8], dtype=torch.float64) / (1 + 1e-6)
    c = g / ((g.square() * 0.001 / 0.001).sqrt() + 1e-6) + 0.01 * before
    close(p.w, (before - 0.01 * before.norm() / c.norm() * c).tolist(), digits=1e-12)


@BOTH
@each_impl
def test_parallel_terms_move_by_lr_times_the_length(op, impl):
    """A first step has m / (1 - beta1) = g, so r = c."""
    p = Pair(impl)
    moved = (p.step(op, (0.6, 0.8)) - torch.tensor([3.0, 4.0])).double().norm()
    assert abs(moved - 0.01 * 5) <= 4 * 2.0**-24 * 5


@BOTH
@any_impl
def test_zero_gradients_and_zero_parameters(op, impl):
    p = Pair(impl)
    p.step(op, (0.0, 0.0))  # only the decay is left, and the ratio makes it a step of lr
    close(p.w, (3 - 0.03, 4 - 0.04))
    assert not p.m.any() and not p.v.any()
    p = Pair(impl)
    assert p.step(op, (0.0, 0.0), weight_decay=0.0).tolist() == [3, 4]  # both zero: the ratio is 1
    p = Pair(impl, start=(0.0, 0.0))
    close(p.step(op, (0.6, -0.8)), (-0.01, 0.01), digits=3e-8)  # 0.01 eps / g: the ratio is 1


# --- what it computes ---


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_not_adapted_takes_adams_step(steps):
    r = regions().clone(torch.float64)
    r.decay = [0] * 4
    lamb, adam = r, r
    for _ in range(steps):
        lamb = stepped("lamb_", lamb, "reference")
        after = adam.clone(torch.float64)
        ops.adamw_(*after.lists(), impl="reference", **HYPER)
        adam = after
    for a, b in zip(lamb.tensors(), adam.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@BOTH
@pytest.mark.parametrize(
    ("impl", "columns", "decay"),
    [(impl, *case) for impl in IMPLS for case in [(1, 0), (5, 5), (50, 31), (50, 0), (133, 64)]] + [("triton", 50, 31)],
)
def test_matches_float64(op, impl, columns, decay):
    r = regions(columns, decay)
    assert_within(stepped(op, r, impl), stepped(op, r.clone(torch.float64), "reference"), bounds(op, r))


def test_whole_blocks_in_triton():
    """Whose squares are summed at once, behind and before the ends of parts."""
    r = Regions(*([torch.randn(2, 3000)] for _ in range(4)), [torch.tensor([0.0, 70.0])], [2500])
    r.exp_avg_sq[0].abs_()
    after = stepped("lans_", r, "triton")
    assert_within(after, stepped("lans_", r.clone(torch.float64), "reference"), bounds("lans_", r))


@BOTH
@any_impl
def test_clipping_and_scale(op, impl):
    r = regions()
    norm, scale = torch.cat([g.flatten() for g in r.grads]).norm(), torch.tensor(0.25)
    options = {"norm": norm, "scale": scale} | ({"max_norm": 0.1} if op == "lamb_" else {})
    factor = 0.1 / float(norm) if op == "lamb_" else 0.25
    exact = stepped(op, r.clone(torch.float64), "reference", **options)
    actual = stepped(op, r, impl, **options)
    assert_within(actual, exact, bounds(op, r, factor, more=3))  # of the clipping: a sum, a product, a quotient
    assert all(torch.equal(a, b) for a, b in zip(actual.grads, r.grads, strict=True))


@BOTH
@each_impl
def test_a_row_is_as_its_tensors_one_by_one(op, impl):
    """Bit for bit: each part of each row has norms of its own, and each row its count."""
    r = regions()
    whole = stepped(op, r, impl)
    ends = [0, *torch.tensor(parts_of(r)[0]).cumsum(0).tolist()]
    for row in range(3):
        for begin, end in itertools.pairwise(ends):
            w, g, m, v = (t[0][row, begin:end].clone() for t in r.lists()[:4])
            step = r.steps[0][row].clone()
            OPS[op]([w], [g], [m], [v], [step], [end - begin if begin < 31 else 0], impl=impl, **HYPER)
            for own, of in ((w, whole.weights), (m, whole.exp_avg), (v, whole.exp_avg_sq)):
                assert torch.equal(own, of[0][row, begin:end])
            assert step == whole.steps[0][row]


@BOTH
@each_impl
def test_many_steps_shrink_a_quadratic(op, impl):
    """The distance to the minimum of |w - target|^2 falls: signs and ratios are right over many steps, too."""
    generator = torch.Generator().manual_seed(0)
    target, w = (torch.randn(6, 8, generator=generator) for _ in range(2))
    m, v, t, distance = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(()), (w - target).norm()
    for i in range(60):
        OPS[op]([w], [w - target], [m], [v], [t], [48], lr=0.1 * (1 - i / 60), weight_decay=0.0, impl=impl)
    assert (w - target).norm() < 0.1 * distance and t == 60


@BOTH
@any_impl
def test_copies_are_the_rounded_weights(op, impl):
    r = regions()
    copies = [torch.full_like(w, torch.nan, dtype=torch.bfloat16) for w in r.weights]
    after = stepped(op, r, impl, copies=copies)
    for copy, w in zip(copies, after.weights, strict=True):
        if impl == "triton" and _triton.INTERPRETED:  # which cuts bits off instead of rounding
            w = (w.view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(copy, w.bfloat16())
    assert same(after, stepped(op, r, impl))


# --- what must not change ---

BAD = {
    "norm inf": {"norm": torch.tensor(torch.inf)},
    "norm nan": {"norm": torch.tensor(torch.nan)},
    "scale inf": {"norm": torch.tensor(1.0), "scale": torch.tensor(torch.inf)},
    "found_inf": {"found_inf": torch.tensor(1.0)},
    "found_inf nan": {"norm": torch.tensor(1.0), "found_inf": torch.tensor(torch.nan)},
}


@BOTH
@pytest.mark.parametrize(("impl", "why"), [*((i, why) for i in IMPLS for why in BAD), ("triton", "found_inf nan")])
def test_a_skipped_step_changes_nothing_but_the_count(op, impl, why):
    r = regions()
    r.grads[0][1, 3] = torch.nan
    copies = [torch.full_like(w, 7.0, dtype=torch.bfloat16) for w in r.weights]
    skipped = torch.tensor([3.0, 1.0])
    after = stepped(op, r, impl, skipped=skipped, copies=copies, **BAD[why])
    assert same(after, r) and all((c == 7).all() for c in copies)
    assert skipped.tolist() == [4, 2]
    fine = {"norm": torch.tensor(1.0), "found_inf": torch.tensor(0.0), "skipped": skipped}
    assert not same(stepped(op, regions(), impl, **fine), regions())
    assert skipped.tolist() == [4, 0]


@BOTH
@each_impl
def test_what_is_not_named_keeps_its_bits(op, impl):
    """Rows of a bank outside the window."""
    tensors = [torch.randn(5, 64) for _ in range(4)]
    tensors[3].abs_()
    steps, before = torch.arange(5.0), [t.clone() for t in tensors]
    OPS[op](*([t[1:3]] for t in tensors), [steps[1:3]], [16], [[5, 11, 48]], impl=impl, **HYPER)
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t[[0, 3, 4]], old[[0, 3, 4]])
    assert not torch.equal(tensors[0][1:3], before[0][1:3])
    assert steps.tolist() == [0, 2, 3, 3, 4]


@BOTH
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 33, 8192 + 3, 2 * 8192])
def test_every_instruction_set_any_alignment(op, isa, size):
    """Sizes around a vector and a task; addresses that are multiples of 4 bytes only; poisoned surroundings."""
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this machine does not run {isa}")
    r = Regions(*([torch.randn(2, size)] for _ in range(4)), [torch.tensor([0.0, 5.0])], [size - size // 4])
    r.exp_avg_sq[0].abs_()
    copies = torch.full((2 * size + 64,), torch.nan, dtype=torch.bfloat16)
    buffers = []
    for i, tensor in enumerate((r.weights[0], r.grads[0], r.exp_avg[0], r.exp_avg_sq[0])):
        buffer = torch.full((2 * size + 64,), torch.nan)
        buffer[17 + i : 17 + i + 2 * size] = tensor.flatten()
        buffers.append((buffer, 17 + i))
    steps = r.steps[0].clone()
    addresses = (*(b.data_ptr() + 4 * at for b, at in buffers), steps.data_ptr(), copies.data_ptr() + 2 * 17)
    call = _C.lamb if op == "lamb_" else _C.lans
    call(regions=[(*addresses, 2, size, r.decay[0])], parts=parts_of(r), **HYPER, max_norm=0.0, norm=0, scale=0,
         found_inf=0, skipped=0, threads=2, isa=isa)  # fmt: skip
    got = [b[at : at + 2 * size].view(2, size) for b, at in buffers]
    after = Regions([got[0]], [got[1]], [got[2]], [got[3]], [steps], r.decay)
    assert_within(after, stepped(op, r.clone(torch.float64), "reference"), bounds(op, r))
    for buffer, at in [*buffers, (copies, 17)]:
        assert buffer[:at].isnan().all() and buffer[at + 2 * size :].isnan().all()
    assert torch.equal(copies[17 : 17 + 2 * size].view(2, size), got[0].bfloat16())


@BOTH
def test_bits_do_not_depend_on_threads(op):
    r = Regions(
        *([torch.randn(3, 30_000), torch.randn(100)] for _ in range(4)), [torch.zeros(3), torch.zeros(())], [20_000, 0]
    )
    for v in r.exp_avg_sq:
        v.abs_()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(stepped(op, r, "native", norm=torch.tensor(3.0)))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


# --- as an op ---


@BOTH
@any_impl
def test_strided_gradients_and_empty_tensors(op, impl):
    r = regions()
    dense, after = stepped(op, r, impl), r.clone()
    after.grads = [torch.cat([r.grads[0], r.grads[0]], 1)[:, :50], r.grads[1].t().contiguous().t(), *r.grads[2:]]
    assert not after.grads[0].is_contiguous() and not after.grads[1].is_contiguous()
    OPS[op](*after.lists(), parts_of(r), impl=impl, **HYPER)
    assert same(after, dense)
    for shape, steps in (((0, 4), torch.zeros(0)), ((3, 0), torch.zeros(3)), ((0,), torch.zeros(()))):
        tensors = ([torch.zeros(shape)] for _ in range(4))
        OPS[op](*tensors, [steps], [0], impl=impl, **HYPER)
        assert (steps == 1).all()


@BOTH
@each_impl
def test_the_version_counters_go_up(op, impl):
    r = regions()
    changed = [*r.weights, *r.exp_avg, *r.exp_avg_sq, *r.steps]
    before, grads = [t._version for t in changed], [g._version for g in r.grads]
    OPS[op](*r.lists(), parts_of(r), impl=impl, **HYPER)
    assert all(t._version > old for t, old in zip(changed, before, strict=True))
    assert [g._version for g in r.grads] == grads


@BOTH
def test_weights_that_require_grad(op):
    r = regions()
    exact = stepped(op, r, "native")
    r.weights = [torch.nn.Parameter(w) for w in r.weights]
    with pytest.raises(
        ValueError, match=f"{op}: what it changes must not require grad; or call it under torch.no_grad"
    ):
        OPS[op](*r.lists(), parts_of(r), **HYPER)
    with torch.no_grad():
        OPS[op](*r.lists(), parts_of(r), **HYPER)
    assert same(r, exact)


@BOTH
@each_impl
def test_opcheck_and_compile(op, impl):
    r, norm, skipped = regions(), torch.tensor(2.0), torch.zeros(2)
    copies, flat = [w.bfloat16() for w in r.weights], [size for row in parts_of(r) for size in row]
    *tensors, decay = r.lists()
    registered = {"lamb_": _lamb_, "lans_": _lans_}[op]
    arguments = (*tensors, copies, skipped, decay, flat, [norm, None, None], [*HYPER.values(), 0.0], impl)
    torch.library.opcheck(registered, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(weights, grads, exp_avg, exp_avg_sq, steps):
        OPS[op](weights, grads, exp_avg, exp_avg_sq, steps, decay, parts_of(r), norm=norm, impl=impl, **HYPER)
        return weights[0] * 2

    after = r.clone()
    exact = stepped(op, r, impl, norm=norm)
    assert torch.equal(step(*after.lists()[:-1]), exact.weights[0] * 2)
    assert same(after, exact)


PARTS = [[10, 21, 19], [35], [9], [1]]
BAD_INPUT = [
    ({"parts": PARTS[:3]}, ValueError, "parts must have 4 entries as weights, got 3"),
    ({"parts": [[31, 18], *PARTS[1:]]}, ValueError, r"parts\[0\] must be sizes that sum to 50, .*got \[31, 18\]"),
    ({"parts": [[31, 0, 19], *PARTS[1:]]}, ValueError, r"parts\[0\] must be sizes that sum to 50"),
    ({"parts": [[30, 20], *PARTS[1:]]}, ValueError, r"decay\[0\] must be where a part begins .*\[0, 30, 50\], got 31"),
    ({"parts": None}, ValueError, r"decay\[0\] must be where a part begins .*\[0, 50\], got 31"),
    ({"eps": 0.0}, ValueError, "eps must be at least 1e-30, got 0.0"),
    ({"eps": float("nan")}, ValueError, r"eps must be in \[0, inf\), got nan"),
    ({"lr": -1.0}, ValueError, r"lr must be in \[0, inf\), got -1.0"),
    ({"norm": torch.ones(1)}, ValueError, "norm must be a floating point scalar"),
    ({"impl": "fast"}, ValueError, "no such implementation"),
]


@BOTH
@pytest.mark.parametrize(("options", "error", "message"), BAD_INPUT)
def test_bad_input(op, options, error, message):
    r = regions()
    before = r.clone()
    with pytest.raises(error, match=f"{op}: .*{message}"):
        OPS[op](*r.lists(), **({"parts": PARTS} | HYPER | options))
    assert same(r, before)


def test_lans_has_no_clipping():
    with pytest.raises(TypeError, match="max_norm"):
        ops.lans_(*regions().lists(), PARTS, **HYPER, max_norm=1.0)


# --- on a GPU ---

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
CUDA = [pytest.param(op, i, marks=gpu) for op in OPS for i in ops.available()[op]["cuda"]]


def moved(r: Regions, device: str) -> Regions:
    return Regions(*([t.to(device) for t in tensors] for tensors in r.lists()[:-1]), r.decay)


@pytest.mark.parametrize(("op", "impl"), CUDA)
def test_cuda(op, impl):
    """As on the CPU, with whole blocks and their ends, copies and a skipped step; the same bits each time."""
    r = Regions(*([torch.randn(3, 10_000), torch.randn(30_522)] for _ in range(4)), [torch.tensor([0.0, 4, 99]), torch.tensor(0.0)], [7_000, 0])  # fmt: skip
    for v in r.exp_avg_sq:
        v.abs_()
    there = moved(r, "cuda")
    copies = [torch.zeros_like(w, dtype=torch.bfloat16) for w in there.weights]
    norm, skipped = torch.tensor(2.0, device="cuda"), torch.zeros(2, device="cuda")
    after = stepped(op, there, impl, copies=copies, norm=norm, skipped=skipped)
    assert_within(moved(after, "cpu"), stepped(op, r.clone(torch.float64), "reference"), bounds(op, r))
    assert all(torch.equal(c, w.bfloat16()) for c, w in zip(copies, after.weights, strict=True))
    for _ in range(10):
        assert same(moved(stepped(op, there, impl, norm=norm), "cpu"), moved(after, "cpu"))
    norm.fill_(torch.inf)
    assert same(moved(stepped(op, there, impl, norm=norm, skipped=skipped), "cpu"), r)
    assert skipped.tolist() == [1, 1]


@pytest.mark.parametrize(("op", "impl"), CUDA)
def test_in_a_cuda_graph(op, impl):
    r, start = moved(regions(), "cuda"), moved(regions(), "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        OPS[op](*r.lists(), parts_of(r), impl=impl, **HYPER)
        with torch.cuda.graph(graph, stream=side):
            OPS[op](*r.lists(), parts_of(r), impl=impl, **HYPER)
    torch.cuda.current_stream().wait_stream(side)
    for tensor, value in zip(r.tensors(), start.tensors(), strict=True):
        tensor.copy_(value)
    exact = stepped(op, start, impl)
    graph.replay()
    assert same(moved(r, "cpu"), moved(exact, "cpu"))
