"""adamw_: against float64 with a bound counted from the formula, against torch.optim.AdamW, and what must not change."""

from __future__ import annotations

import pytest
import torch
from optimizer_regions import HYPER, Regions, assert_norm, assert_within, bounds, norm_tensors, regions, same, stepped

from stackbert_kernels import ops
from stackbert_kernels.ops import _triton
from stackbert_kernels.ops._library import _C
from stackbert_kernels.ops.optimizer.op import _adamw_, _global_norm

IMPLS = ("reference", "native", "triton")
ISAS = ["generic", "avx2", "avx512"]


def torchs(r: Regions, **options) -> Regions:
    """The same step by torch.optim.AdamW: a parameter for every part of a row that decays or does not."""
    after, groups = r.clone(r.weights[0].dtype), {True: [], False: []}
    states, pieces = {}, []
    for w, g, m, v, t, decay in zip(*after.lists(), strict=True):
        rows = max(1, t.numel()) if t.dim() else 1
        views = [x.view(rows, -1) for x in (w, g, m, v)]
        for row in range(rows):
            for decays, part in ((True, slice(0, decay)), (False, slice(decay, None))):
                w_, g_, m_, v_ = (x[row, part] for x in views)
                if w_.numel() == 0:
                    continue
                p = torch.nn.Parameter(w_.clone())
                p.grad = g_.clone()
                states[p] = {"step": t.view(rows)[row].clone(), "exp_avg": m_.clone(), "exp_avg_sq": v_.clone()}
                groups[decays].append(p)
                pieces.append((p, w_, m_, v_))
        t += 1
    optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        lr=HYPER["lr"], betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"], weight_decay=HYPER["weight_decay"], **options,
    )  # fmt: skip
    optimizer.state.update(states)
    optimizer.step()
    for p, w, m, v in pieces:
        for target, value in ((w, p.detach()), (m, states[p]["exp_avg"]), (v, states[p]["exp_avg_sq"])):
            target.copy_(value)
    return after


# --- what it computes ---


def test_the_reference_is_torchs_in_float64():
    r = regions().clone(torch.float64)
    ours, theirs = stepped(r, "reference"), torchs(r, foreach=True)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("columns", "decay"), [(1, 0), (5, 5), (50, 31), (50, 0), (50, 50), (133, 64)])
def test_matches_float64(impl, columns, decay):
    r = regions(columns, decay)
    assert_within(stepped(r, impl), stepped(r.clone(torch.float64), "reference"), bounds(r))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_matches_torch(impl, options):
    """Both are off the exact result by at most the bound."""
    r = regions()
    assert_within(stepped(r, impl), torchs(r, **options), bounds(r), slack=2.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_steps_stay_close_to_float64(impl):
    """From zero moments, as a run begins; rounding adds up over the steps at most."""
    r = regions()
    for tensor in (*r.exp_avg, *r.exp_avg_sq, *r.steps):
        tensor.zero_()
    exact = r.clone(torch.float64)
    generator, total = torch.Generator().manual_seed(1), None
    for _ in range(10):
        for g, wide in zip(r.grads, exact.grads, strict=True):
            g.copy_(
                torch.randn(g.shape, generator=generator) + 1.0
            )  # of one sign mostly: nothing cancels in the moments
            wide.copy_(g)
        each = bounds(r)
        total = each if total is None else [tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in zip(total, each, strict=True)]  # fmt: skip
        r, exact = stepped(r, impl), stepped(exact, "reference")
    assert_within(
        r, exact, total, slack=2.0
    )  # what a step adds is passed on by the next ones, diminished but for the weight


@pytest.mark.parametrize("impl", IMPLS)
def test_many_rows(impl):
    """Far apart in their step counts: each has its own correction."""
    r = Regions(*([torch.randn(70, 3)] for _ in range(4)), [torch.arange(70.0) ** 2], [2])
    r.exp_avg_sq[0].abs_()
    assert_within(stepped(r, impl), stepped(r.clone(torch.float64), "reference"), bounds(r))


@pytest.mark.parametrize("impl", IMPLS)
def test_clipping_and_scale_are_torchs(impl):
    r = regions()
    norm = torch.cat([g.flatten() for g in r.grads]).norm()
    scale = torch.tensor(0.25)
    clipped = r.clone()
    parameters = [torch.nn.Parameter(w) for w in clipped.weights]
    for p, g in zip(parameters, clipped.grads, strict=True):
        p.grad = g.mul_(scale)
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    exact = stepped(clipped.clone(torch.float64), "reference")
    actual = stepped(r, impl, norm=norm, max_norm=0.1, scale=scale)
    assert_within(actual, exact, bounds(clipped), slack=2.0)  # the gradients that torch clipped were rounded once more
    assert all(torch.equal(a, b) for a, b in zip(actual.grads, r.grads, strict=True))
    assert same(stepped(r, impl, norm=norm, max_norm=1e6), stepped(r, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_copies_are_the_rounded_weights(impl):
    r = regions()
    copies = [torch.full_like(w, torch.nan, dtype=torch.bfloat16) for w in r.weights]
    after = stepped(r, impl, copies=copies)
    for copy, w in zip(copies, after.weights, strict=True):
        if impl == "triton" and _triton.INTERPRETED:  # which cuts bits off instead of rounding
            w = (w.view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(copy, w.bfloat16())
    assert same(after, stepped(r, impl))


# --- what must not change ---

BAD = {
    "norm inf": {"norm": torch.tensor(torch.inf), "max_norm": 1.0},
    "norm nan": {"norm": torch.tensor(torch.nan)},
    "scale inf": {"norm": torch.tensor(1.0), "scale": torch.tensor(torch.inf)},
    "found_inf": {"found_inf": torch.tensor(1.0)},
    "found_inf nan": {"norm": torch.tensor(1.0), "found_inf": torch.tensor(torch.nan)},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("why", BAD)
def test_a_skipped_step_changes_nothing_but_the_count(impl, why):
    r = regions()
    r.grads[0][1, 3] = torch.nan
    copies = [torch.full_like(w, 7.0, dtype=torch.bfloat16) for w in r.weights]
    skipped = torch.tensor([3.0, 1.0])
    before = r.clone()
    after = stepped(r, impl, skipped=skipped, copies=copies, **BAD[why])
    assert same(after, before)
    assert all((c == 7).all() for c in copies)
    assert skipped.tolist() == [4, 2]
    fine = {"norm": torch.tensor(1.0), "found_inf": torch.tensor(0.0), "skipped": skipped}
    assert not same(stepped(regions(), impl, **fine), regions())
    assert skipped.tolist() == [4, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_named_keeps_its_bits(impl):
    """Rows of a bank outside the window, and what lies beside each tensor."""
    tensors = [torch.randn(5, 64) for _ in range(4)]
    tensors[3].abs_()
    steps, before = torch.arange(5.0), [t.clone() for t in tensors]
    ops.adamw_(*([t[1:3]] for t in tensors), [steps[1:3]], [16], impl=impl, **HYPER)
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t[[0, 3, 4]], old[[0, 3, 4]])
    assert not torch.equal(tensors[0][1:3], before[0][1:3])
    assert steps.tolist() == [0, 2, 3, 3, 4]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 15, 16, 33, 8192 + 3, 2 * 8192])
def test_every_instruction_set_any_alignment(isa, size):
    """Sizes around a vector and a task; addresses that are multiples of 4 bytes only; poisoned surroundings."""
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this machine does not run {isa}")
    r = Regions(*([torch.randn(2, size)] for _ in range(4)), [torch.tensor([0.0, 5.0])], [min(size, 20)])
    r.exp_avg_sq[0].abs_()
    copies = torch.full((2 * size + 64,), torch.nan, dtype=torch.bfloat16)
    buffers = []
    for i, tensor in enumerate((r.weights[0], r.grads[0], r.exp_avg[0], r.exp_avg_sq[0])):
        buffer = torch.full((2 * size + 64,), torch.nan)
        buffer[17 + i : 17 + i + 2 * size] = tensor.flatten()
        buffers.append((buffer, 17 + i))
    steps = r.steps[0].clone()
    region = (
        *(b.data_ptr() + 4 * at for b, at in buffers),
        steps.data_ptr(),
        copies.data_ptr() + 2 * 17,
        2,
        size,
        r.decay[0],
    )
    _C.adamw(regions=[region], **HYPER, max_norm=0.0, norm=0, scale=0, found_inf=0, skipped=0, threads=2, isa=isa)
    got = [b[at : at + 2 * size].view(2, size) for b, at in buffers]
    after = Regions([got[0]], [got[1]], [got[2]], [got[3]], [steps], r.decay)
    assert_within(after, stepped(r.clone(torch.float64), "reference"), bounds(r))
    for buffer, at in [*buffers, (copies, 17)]:
        assert buffer[:at].isnan().all() and buffer[at + 2 * size :].isnan().all()
    assert torch.equal(copies[17 : 17 + 2 * size].view(2, size), got[0].bfloat16())


def test_bits_do_not_depend_on_threads():
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
            results.append(stepped(r, "native", norm=torch.tensor(3.0), max_norm=1.0))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


# --- as an op ---


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_gradients_and_empty_tensors(impl):
    r = regions()
    dense = stepped(r, impl)
    r.grads[0] = torch.cat([r.grads[0], r.grads[0]], 1)[:, :50]
    r.grads[1] = r.grads[1].t().contiguous().t()
    assert not r.grads[0].is_contiguous() and not r.grads[1].is_contiguous()
    after = r.clone()
    after.grads = r.grads
    ops.adamw_(*after.lists(), impl=impl, **HYPER)
    assert same(after, dense)
    for shape, steps in (((0, 4), torch.zeros(0)), ((3, 0), torch.zeros(3)), ((0,), torch.zeros(()))):
        tensors = ([torch.zeros(shape)] for _ in range(4))
        ops.adamw_(*tensors, [steps], [0], impl=impl, **HYPER)
        assert (steps == 1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_version_counters_go_up(impl):
    r = regions()
    x = torch.randn(9, requires_grad=True)
    y = (x * r.weights[2]).sum()
    changed = [*r.weights, *r.exp_avg, *r.exp_avg_sq, *r.steps]
    before, grads = [t._version for t in changed], [g._version for g in r.grads]
    ops.adamw_(*r.lists(), impl=impl, **HYPER)
    assert all(t._version > old for t, old in zip(changed, before, strict=True))
    assert [g._version for g in r.grads] == grads
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_weights_that_require_grad():
    r = regions()
    r.weights = [torch.nn.Parameter(w) for w in r.weights]
    with pytest.raises(ValueError, match=r"must not require grad; or call it under torch.no_grad"):
        ops.adamw_(*r.lists(), **HYPER)
    exact = stepped(r, "native")
    with torch.no_grad():
        ops.adamw_(*r.lists(), **HYPER)
    assert same(r, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_and_compile(impl):
    r, norm, skipped = regions(), torch.tensor(2.0), torch.zeros(2)
    copies = [w.bfloat16() for w in r.weights]
    scalars, numbers = [norm, None, None], [*HYPER.values(), 1.0]
    *tensors, decay = r.lists()
    torch.library.opcheck(_adamw_, (*tensors, copies, skipped, decay, scalars, numbers, impl))
    torch.library.opcheck(_adamw_, (*tensors, [], None, decay, [None] * 3, numbers, impl))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(weights, grads, exp_avg, exp_avg_sq, steps):
        ops.adamw_(weights, grads, exp_avg, exp_avg_sq, steps, decay, norm=norm, max_norm=1.0, impl=impl, **HYPER)
        return weights[0] * 2

    after = r.clone()
    exact = stepped(r, impl, norm=norm, max_norm=1.0)
    assert torch.equal(step(*after.lists()[:-1]), exact.weights[0] * 2)
    assert same(after, exact)


def wrong(**values) -> Regions:
    r = regions()
    for name, value in values.items():
        getattr(r, name)[0] = value
    return r


X = torch.zeros(3, 50)
BAD_INPUT = [
    (wrong(), {"lr": -1.0}, ValueError, r"lr must be in \[0, inf\), got -1.0"),
    (wrong(), {"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\), got 1.0"),
    (wrong(), {"eps": float("nan")}, ValueError, r"eps must be in \[0, inf\), got nan"),
    (wrong(), {"max_norm": -2.0}, ValueError, "max_norm must be in"),
    (wrong(), {"norm": torch.ones(1)}, ValueError, r"norm must be a floating point scalar on cpu, got torch.float32 \[1\]"),
    (wrong(), {"found_inf": torch.tensor(1)}, ValueError, "found_inf must be a floating point scalar"),
    (wrong(), {"skipped": torch.zeros(3)}, ValueError, r"skipped must be \[2\]"),
    (wrong(), {"skipped": torch.zeros(4)[::2]}, ValueError, r"skipped must be dense, .*strides \[2\]"),
    (wrong(steps=torch.zeros(3, 1)), {}, ValueError, r"steps\[0\] must be \[3\]"),
    (wrong(), {"copies": [torch.zeros(3)]}, ValueError, "copies must have 4 entries as weights, got 1"),
    (wrong(), {"copies": [X, X, X, X]}, TypeError, r"copies\[0\] must be torch.bfloat16, got torch.float32"),
    (wrong(), {"impl": "fast"}, ValueError, "no such implementation"),
    (wrong(decay=51), {}, ValueError, r"decay\[0\] must be in 0..50, the elements of a row, got 51"),
    (wrong(grads=X[:, 1:]), {}, ValueError, r"grads\[0\] must be \[3, 50\] on cpu, got torch.float32 \[3, 49\]"),
    (wrong(grads=X.double()), {}, TypeError, r"grads\[0\] must be torch.float32, got torch.float64"),
    (wrong(exp_avg=X.t().contiguous().t()), {}, ValueError, r"exp_avg\[0\] must be dense, .*strides \[1, 3\]"),
    (wrong(steps=torch.zeros(2)), {}, ValueError, r"steps\[0\] must be \[3\]"),
    (wrong(steps=torch.zeros(3, dtype=torch.int64)), {}, TypeError, r"steps\[0\] must be torch.float32"),
    (wrong(weights=X.long()), {}, TypeError, "weights must be floating point, got torch.int64"),
    (Regions([], [], [], [], [], []), {}, ValueError, "weights must name at least one tensor"),
    (regions().clone(torch.float64), {"impl": "native"}, ValueError, "native takes float32 weights, got float64; usable: reference"),
]  # fmt: skip


@pytest.mark.parametrize(("r", "options", "error", "message"), BAD_INPUT)
def test_bad_input(r, options, error, message):
    before = [t.clone() for t in r.tensors()]
    with pytest.raises(error, match=message):
        ops.adamw_(*r.lists(), **(HYPER | options))
    assert all(torch.equal(t, old) for t, old in zip(r.tensors(), before, strict=True))


# --- the global norm ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", [5, 4096, 8192])
def test_global_norm(impl, block):
    mixed = norm_tensors(block)  # the third is so large that it hides the others
    for tensors in (
        mixed,
        mixed[:2],
        mixed[3:],
        [torch.randn(block)],
        [torch.randn(3, block).t()],
        [torch.zeros(4)],
        [torch.zeros(0)],
    ):
        assert_norm(ops.global_norm(tensors, impl=impl), tensors)
        clipped = [t.clone().requires_grad_() for t in tensors]
        with torch.no_grad():
            assert torch.equal(ops.global_norm(clipped, impl=impl), ops.global_norm(tensors, impl=impl))


@pytest.mark.parametrize("isa", ISAS)
def test_global_norm_on_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this machine does not run {isa}")
    tensors, norms = norm_tensors(8192), []
    for threads in (1, 3):
        norm = torch.tensor(torch.nan)
        _C.global_norm([(t.data_ptr(), t.numel()) for t in tensors], norm.data_ptr(), threads=threads, isa=isa)
        assert_norm(norm, tensors)
        norms.append(norm)
    assert torch.equal(*norms)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("value", "finite"), [(torch.inf, False), (-torch.inf, False), (torch.nan, False), (1e18, True)]
)
def test_global_norm_tells_what_is_not_finite(impl, value, finite):
    """In a whole block, and at the end of a tensor."""
    for place in (3, 8192, 8199):
        tensors = [torch.zeros(9), torch.ones(8200)]
        tensors[1][place] = value
        assert torch.isfinite(ops.global_norm(tensors, impl=impl)) == finite


@pytest.mark.parametrize("impl", IMPLS)
def test_global_norm_as_an_op(impl):
    tensors = norm_tensors(64)
    torch.library.opcheck(_global_norm, (tensors, impl))
    compiled = torch.compile(lambda *t: ops.global_norm(t, impl=impl) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), ops.global_norm(tensors, impl=impl) * 2)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "tensors must name at least one tensor"),
        ([torch.zeros(3, dtype=torch.int64)], TypeError, "tensors must be floating point, got torch.int64"),
        ([torch.zeros(3), torch.zeros(3).double()], ValueError, r"tensors\[1\] must be torch.float32 on cpu .*float64"),
        ([torch.zeros(3, requires_grad=True)], ValueError, "tensors must not require grad"),
    ],
)
def test_global_norm_of_bad_input(tensors, error, message):
    with pytest.raises(error, match=f"global_norm: {message}"):
        ops.global_norm(tensors)


# --- on a GPU ---

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def on_gpu(r: Regions) -> Regions:
    return Regions(*([t.cuda() for t in tensors] for tensors in r.lists()[:-1]), r.decay)


def on_cpu(r: Regions) -> Regions:
    return Regions(*([t.cpu() for t in tensors] for tensors in r.lists()[:-1]), r.decay)


@pytest.mark.parametrize("impl", [pytest.param(i, marks=gpu) for i in ops.available()["adamw_"]["cuda"]])
def test_cuda(impl):
    """As on the CPU, with whole blocks and their ends, copies and a skipped step; the same bits each time."""
    r = Regions(*([torch.randn(3, 10_000), torch.randn(30_522)] for _ in range(4)), [torch.tensor([0.0, 4, 99]), torch.tensor(0.0)], [7_000, 0])  # fmt: skip
    for v in r.exp_avg_sq:
        v.abs_()
    there = on_gpu(r)
    copies = [torch.zeros_like(w, dtype=torch.bfloat16) for w in there.weights]
    norm, skipped = torch.tensor(2.0, device="cuda"), torch.zeros(2, device="cuda")
    options = {"norm": norm, "max_norm": 3.0, "skipped": skipped}
    after = stepped(there, impl, copies=copies, **options)
    assert_within(on_cpu(after), stepped(r.clone(torch.float64), "reference"), bounds(r))
    assert all(torch.equal(c, w.bfloat16()) for c, w in zip(copies, after.weights, strict=True))
    for _ in range(10):
        assert same(on_cpu(stepped(there, impl, **options)), on_cpu(after))
    norm.fill_(torch.inf)
    assert same(on_cpu(stepped(there, impl, **options)), r)
    assert skipped.tolist() == [1, 1]


@pytest.mark.parametrize("impl", [pytest.param(i, marks=gpu) for i in ops.available()["adamw_"]["cuda"]])
def test_in_a_cuda_graph(impl):
    r, start = on_gpu(regions()), on_gpu(regions())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        ops.adamw_(*r.lists(), impl=impl, **HYPER)
        with torch.cuda.graph(graph, stream=side):
            ops.adamw_(*r.lists(), impl=impl, **HYPER)
    torch.cuda.current_stream().wait_stream(side)
    for tensor, value in zip(r.tensors(), start.tensors(), strict=True):
        tensor.copy_(value)
    exact = stepped(start, impl)
    graph.replay()
    assert same(on_cpu(r), on_cpu(exact))


@pytest.mark.parametrize("impl", [pytest.param(i, marks=gpu) for i in ops.available()["global_norm"]["cuda"]])
def test_cuda_global_norm(impl):
    tensors = norm_tensors(100_000)
    there = [t.cuda() for t in tensors]
    norm = ops.global_norm(there, impl=impl)
    assert_norm(norm.cpu(), tensors)
    assert all(torch.equal(ops.global_norm(there, impl=impl), norm) for _ in range(10))
    there[0][1, 7] = torch.nan
    assert ops.global_norm(there, impl=impl).isnan()
