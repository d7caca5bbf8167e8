"""layer_norm, dropout_add_layer_norm, dropout_add: against float64, with PyTorch's own error in the same dtype as the measure."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from python_tests.oracle import assert_as_accurate_as_torch
from stackbert_kernels import ops
from stackbert_kernels.ops import philox
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES
from stackbert_kernels.ops.layer_norm import op

EPS = 1e-12
RNG = ops.new_rng(2**40 + 7, 2**33 + 5)
SITE = 3
ISAS = ["generic", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16]
FAST_CHECKS = ("test_schema", "test_faketensor")  # what there is to check of an op without autograd


class Case(NamedTuple):
    rows: int
    columns: int
    offset: float = 0.0  # |mean| >> std: a one-pass variance loses its digits here
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    impl: str = "native"


CASES = [
    Case(1, 1),
    Case(3, 7),  # less than a vector
    Case(5, 769),  # a tail behind whole vectors
    Case(16, 768),
    Case(16, 768, offset=30.0),
    Case(300, 40),  # several chunks of rows
    Case(5, 769, dtype=torch.bfloat16),
    Case(16, 768, dtype=torch.bfloat16),
    Case(16, 768, offset=30.0, dtype=torch.bfloat16),
    Case(33, 7, dtype=torch.bfloat16, parameters=torch.bfloat16),
    # The interpreter is exact in float32 only, and slow.
    Case(1, 1, impl="triton"),
    Case(3, 7, impl="triton"),
    Case(3, 300, impl="triton"),  # three chunks of 128, the last not full; less than a tile of rows
    Case(5, 768, offset=30.0, impl="triton"),
    Case(230, 16, impl="triton"),  # programs of several tiles, the last not full
]
case_ids = [f"{c.rows}x{c.columns}+{c.offset:g}-{str(c.dtype)[6:]}-{str(c.parameters)[6:]}-{c.impl}" for c in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=case_ids)


def activations(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual"""
    x, residual = torch.randn(case.rows, case.columns), torch.randn(case.rows, case.columns) + case.offset
    return x.to(case.dtype), residual.to(case.dtype)


def parameters(case: Case, count: int) -> list[torch.Tensor]:
    return [torch.randn(case.columns).to(case.parameters) for _ in range(count)]


def run(function, inputs, dy):
    """Output and the gradient of every input."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def judge(names, native, exact, baseline):
    for name, ours, want, torchs in zip(names, native, exact, baseline, strict=True):
        slack = 2.0 if name == "y" else 3.0
        assert ours.dtype == torchs.dtype
        assert_as_accurate_as_torch(name, ours, want, torchs, slack)


def doubles(tensors):
    return [t.double() for t in tensors]


@every_case
def test_layer_norm_matches_float64(case):
    inputs = [activations(case)[1], *parameters(case, 2)]
    dy = torch.randn(case.rows, case.columns).to(case.dtype)

    def torchs(x, weight, bias):
        return F.layer_norm(x, (case.columns,), weight.to(x.dtype), bias.to(x.dtype), EPS)

    exact = run(torchs, doubles(inputs), dy)
    ours = run(lambda *a: ops.layer_norm(*a, impl=case.impl), inputs, dy)
    judge(["y", "dx", "dweight", "dbias"], ours, exact, run(torchs, inputs, dy))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_x_bias", "x_bias"])
@every_case
def test_dropout_add_layer_norm_matches_float64(case, with_bias, p):
    x, residual = activations(case)
    inputs = [x, residual, *parameters(case, 2 + with_bias)]
    dy = torch.randn(case.rows, case.columns).to(case.dtype)

    def ours(x, residual, weight, bias, x_bias=None, impl=case.impl):
        return ops.dropout_add_layer_norm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=p, rng=RNG, site=SITE, impl=impl
        )

    def torchs(x, residual, weight, bias, x_bias=None):
        h = x if x_bias is None else x + x_bias.to(x.dtype)
        factors = philox.row_factors(RNG, SITE, round(256 * p), x).to(x.dtype) if p else 1.0
        return F.layer_norm(residual + h * factors, (case.columns,), weight.to(x.dtype), bias.to(x.dtype), EPS)

    exact = run(torchs, doubles(inputs), dy)
    torch.testing.assert_close(run(lambda *a: ours(*a, impl="reference"), doubles(inputs), dy), exact)
    names = ["y", "dx", "dresidual", "dweight", "dbias", "dx_bias"][: 1 + len(inputs)]
    judge(names, run(ours, inputs, dy), exact, run(torchs, inputs, dy))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_x_bias", "x_bias"])
@every_case
def test_dropout_add_matches_float64(case, with_bias, p):
    inputs = [*activations(case), *parameters(case, with_bias)]
    dy = torch.randn(case.rows, case.columns).to(case.dtype)

    def ours(x, residual, x_bias=None, impl=case.impl):
        return ops.dropout_add(x, residual, x_bias=x_bias, dropout_p=p, rng=RNG, site=SITE, impl=impl)

    def torchs(x, residual, x_bias=None):
        h = x if x_bias is None else x + x_bias.to(x.dtype)
        return residual + (h * philox.row_factors(RNG, SITE, round(256 * p), x).to(x.dtype) if p else h)

    exact = run(torchs, doubles(inputs), dy)
    torch.testing.assert_close(run(lambda *a: ours(*a, impl="reference"), doubles(inputs), dy), exact)
    judge(["y", "dx", "dresidual", "dx_bias"][: 1 + len(inputs)], run(ours, inputs, dy), exact, run(torchs, inputs, dy))


def test_gradcheck_of_the_reference():
    x, residual = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias, x_bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    options = {"dropout_p": 0.3, "rng": RNG, "site": SITE, "impl": "reference"}
    torch.autograd.gradcheck(lambda *a: ops.layer_norm(*a, impl="reference"), (x, weight, bias))
    torch.autograd.gradcheck(
        lambda x, r, w, b, xb: ops.dropout_add_layer_norm(x, r, w, b, x_bias=xb, **options),
        (x, residual, weight, bias, x_bias),
    )
    torch.autograd.gradcheck(lambda x, r, xb: ops.dropout_add(x, r, x_bias=xb, **options), (x, residual, x_bias))


@pytest.mark.parametrize(
    ("impl", "dtype"), [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32)]
)
def test_masks_are_the_references(impl, dtype):
    """x = 1 and residual = 0 make the output the mask itself; dy = 1 makes dx the backward's."""
    x, residual = torch.ones(19, 300, dtype=dtype, requires_grad=True), torch.zeros(19, 300, dtype=dtype)
    want = philox.row_factors(RNG, SITE, 26, x).to(dtype)
    options = {"dropout_p": 0.1, "rng": RNG, "site": SITE, "impl": impl}
    y = ops.dropout_add(x, residual, **options)
    assert torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    x_bias = torch.zeros(300, requires_grad=True)
    y = ops.dropout_add(x, residual, x_bias=x_bias, **options)  # backward by another kernel
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)

    weight, bias = torch.randn(300), torch.randn(300)
    y = ops.dropout_add_layer_norm(x, residual, weight, bias, **options)
    (dx,) = torch.autograd.grad(y, x, torch.randn(19, 300).to(dtype))
    assert torch.equal(dx == 0, want == 0)


def test_triton_of_wide_rows():
    """Several warps share a row, and each lane holds several chunks of it; 8192 is the widest."""
    inputs = [torch.randn(1, 8192), torch.randn(1, 8192), *(torch.randn(8192) for _ in range(3))]
    dy = torch.randn(1, 8192)

    def block(x, residual, weight, bias, x_bias, impl):
        options = {"x_bias": x_bias, "dropout_p": 0.1, "rng": RNG, "site": SITE, "impl": impl}
        return ops.dropout_add_layer_norm(x, residual, weight, bias, **options)

    exact, torchs, ours = (
        run(lambda *t, impl=impl: block(*t, impl), [t.to(dtype) for t in inputs], dy)
        for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32))
    )
    judge(["y", "dx", "dresidual", "dweight", "dbias", "dx_bias"], ours, exact, torchs)
    with pytest.raises(ValueError, match="triton takes rows of at most 8192 elements, got 8193"):
        ops.layer_norm(torch.ones(1, 8193), torch.ones(8193), torch.ones(8193), impl="triton")


def test_triton_strides_and_what_lies_between_rows():
    """Rows far apart, columns apart, one row repeated: the bits are those of dense input, and what lies between is not read."""
    weight, bias, x_bias = (torch.randn(40) for _ in range(3))
    sides = [torch.full((9, 64), torch.nan) for _ in range(3)]
    for side in sides:
        side[:, 8:48] = torch.randn(9, 40)
    rows_apart = [side[:, 8:48] for side in sides]
    columns_apart = [torch.randn(40, 9).T for _ in range(3)]
    repeated = [torch.randn(1, 40).expand(9, 40) for _ in range(3)]

    def block(x, residual, weight, bias, x_bias):
        options = {"x_bias": x_bias, "dropout_p": 0.2, "rng": RNG, "impl": "triton"}
        z = ops.dropout_add(x, residual, **options)
        return ops.dropout_add_layer_norm(
            ops.layer_norm(z, weight, bias, impl="triton"), residual, weight, bias, **options
        )

    for x, residual, dy in (rows_apart, columns_apart, repeated):
        dense = [t.contiguous() for t in (x, residual)]
        views = [t.detach().requires_grad_() for t in (x, residual)]
        got = block(*views, weight, bias, x_bias)
        got = [got, *torch.autograd.grad(got, views, dy)]
        want = run(lambda x, residual: block(x, residual, weight, bias, x_bias), dense, dy.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_triton_outputs_are_written_whole_and_alone(monkeypatch):
    """Every allocation lies between guards and starts as NaN."""
    buffers = []

    def poisoned(shape, dtype):
        tensor, buffer = guarded((shape,) if isinstance(shape, int) else shape, dtype)
        buffers.append(buffer)
        return tensor

    monkeypatch.setattr(torch, "empty_like", lambda x, **_: poisoned(x.shape, x.dtype))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda x, shape, **options: poisoned(shape, options["dtype"]) if shape else new_empty(x, shape, **options),
    )
    x, residual, dy = (torch.randn(5, 37) for _ in range(3))
    weight, bias, x_bias = (torch.randn(37) for _ in range(3))
    kernel = pytest.importorskip("stackbert_kernels.ops.layer_norm.triton_kernel")
    _, mean, rstd = kernel.dropout_add_layer_norm_fwd(x, residual, weight, bias, x_bias, RNG, SITE, 26, EPS)
    kernel.dropout_add_layer_norm_bwd(dy, x, residual, weight, bias, x_bias, mean, rstd, RNG, SITE, 26)
    kernel.dropout_add_fwd(x, residual, x_bias, RNG, SITE, 26)
    kernel.dropout_add_bwd(dy, x_bias, RNG, SITE, 26)
    kernel.layer_norm_forward_only(x, weight, bias, EPS)
    assert len(buffers) == 3 + 6 + 1 + 3 + 1  # y, statistics; dx, dz, partial, three sums; y; dx, partial, sum; y
    for buffer in buffers:
        assert_guards_untouched(buffer)


def guarded(shape, dtype, guard=64):
    """A poisoned tensor inside a larger poisoned buffer, and the buffer."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * guard,), torch.nan, dtype=dtype)
    return buffer[guard : guard + count].view(shape), buffer


def assert_guards_untouched(buffer, guard=64):
    assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
    assert not buffer[guard:-guard].isnan().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 769), (130, 64)])
def test_kernels_stay_inside_their_outputs(rows, columns, dtype, isa):
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this machine does not run {isa}")
    case = Case(rows, columns, dtype=dtype)
    (x, residual), (weight, bias, x_bias) = activations(case), parameters(case, 3)
    dy = torch.randn(rows, columns).to(dtype)
    sizes = {"rows": rows, "columns": columns, "dtype": NATIVE_DTYPES[dtype], "isa": isa, "threads": 2}
    sizes |= {"rng": RNG.data_ptr(), "site": SITE, "threshold": 26}
    inputs = {
        "x": x.data_ptr(),
        "residual": residual.data_ptr(),
        "x_bias": x_bias.data_ptr(),
        "weight": weight.data_ptr(),
    }

    outputs = {n: guarded((rows, columns), dtype) for n in ("y", "dx", "dresidual")}
    outputs |= {n: guarded((rows,), torch.float32) for n in ("mean", "rstd")}
    outputs |= {n: guarded((columns,), torch.float32) for n in ("dweight", "dbias", "dx_bias")}
    address = {n: tensor.data_ptr() for n, (tensor, _) in outputs.items()}
    space = [torch.full((_C.row_workspace(rows, columns, extra) + 64,), torch.nan) for extra in (0, 4)]
    _C.layer_norm_fwd(
        **inputs, bias=bias.data_ptr(), **{n: address[n] for n in ("y", "mean", "rstd")}, workspace=space[0].data_ptr(), eps=EPS, **sizes
    )  # fmt: skip
    grads = {n: address[n] for n in ("mean", "rstd", "dx", "dresidual", "dweight", "dbias", "dx_bias")}
    _C.layer_norm_bwd(dy=dy.data_ptr(), **inputs, **grads, workspace=space[1].data_ptr(), **sizes)
    for _, buffer in outputs.values():
        assert_guards_untouched(buffer)
    assert all(s[-64:].isnan().all() for s in space)

    # float64 from the same (rounded) inputs; half an ulp of the dtype for the final rounding, and what fp32 sums lose
    exact = [t.double() for t in (x, residual, weight, bias, x_bias)]
    y, mean, rstd = op._dropout_add_layer_norm_fwd(*exact, RNG, SITE, 26, EPS, "reference")
    x64, residual64, weight64, bias64, x_bias64 = exact
    wants = op._dropout_add_layer_norm_bwd(
        dy.double(), x64, residual64, weight64, bias64, x_bias64, mean, rstd, RNG, SITE, 26, "reference"
    )
    named = dict(zip(("dx", "dresidual", "dweight", "dbias", "dx_bias"), wants, strict=True)) | {
        "y": y,
        "mean": mean,
        "rstd": rstd,
    }
    for name, want in named.items():
        got = outputs[name][0]
        scale = want.abs().max() if columns > 1 else 1.0  # one column: the gradients are zero
        assert (got.double() - want).abs().max() <= (torch.finfo(got.dtype).eps + 1e-6) * scale, name

    z, buffer = guarded((rows, columns), dtype)
    _C.dropout_add_fwd(
        x=x.data_ptr(), residual=residual.data_ptr(), x_bias=x_bias.data_ptr(), y=z.data_ptr(), workspace=space[0].data_ptr(), **sizes
    )  # fmt: skip
    assert_guards_untouched(buffer)
    assert torch.equal(z, ops.dropout_add(x, residual, x_bias=x_bias, dropout_p=0.1, rng=RNG, site=SITE))
    dx, buffer = guarded((rows, columns), dtype)
    _C.dropout_add_bwd(
        dy=dy.data_ptr(), dx=dx.data_ptr(), dx_bias=address["dx_bias"], workspace=space[1].data_ptr(), **sizes
    )
    assert_guards_untouched(buffer)
    assert torch.equal(dx, ops.dropout(dy, 0.1, rng=RNG, site=SITE))


def test_an_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match="isa must be best, generic, avx2 or avx512"):
        x = torch.ones(1, 1)
        _C.bias_gelu_fwd(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1, 1, 0, False, 1, isa="sse9")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_repetition(dtype):
    case = Case(1000, 96, dtype=dtype)
    inputs = [*activations(case), *parameters(case, 3)]
    dy = torch.randn(1000, 96)

    def everything(x, residual, weight, bias, x_bias):
        options = {"x_bias": x_bias, "dropout_p": 0.2, "rng": RNG}
        return ops.dropout_add_layer_norm(x, ops.dropout_add(x, residual, **options), weight, bias, **options)

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(run(everything, inputs, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_have_the_bits_of_small_ones(dtype):
    """From 8 MB on results are written past the caches."""
    rows, columns = (9 << 20) // (768 * dtype.itemsize), 768
    x, residual, dy = (torch.randn(rows, columns).to(dtype) for _ in range(3))
    weight, bias = torch.randn(columns), torch.randn(columns)

    def results(part):
        inputs = [x[part], residual[part], weight, bias]
        return run(ops.dropout_add_layer_norm, inputs, dy[part])[:3]  # the sums over rows differ

    halves = zip(results(slice(0, rows // 2)), results(slice(rows // 2, rows)), strict=True)
    for whole, parts in zip(results(slice(0, rows)), halves, strict=True):
        assert torch.equal(whole, torch.cat(parts))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stackbert":
            self.names.append(func._schema.name.removeprefix("stackbert::"))
        return func(*args, **(kwargs or {}))


def test_frozen_layers_take_the_forward_only_kernels():
    x, weight, bias = torch.randn(4, 8), torch.ones(8), torch.zeros(8)
    trained = torch.ones(8, requires_grad=True)
    with Calls() as calls:
        frozen = ops.layer_norm(x, weight, bias), ops.dropout_add_layer_norm(x, x, weight, bias, dropout_p=0.5, rng=RNG)
        with torch.no_grad():
            ops.layer_norm(x, trained, bias)
        kept = ops.layer_norm(x, trained, bias), ops.dropout_add_layer_norm(x, x, trained, bias, dropout_p=0.5, rng=RNG)
    assert calls.names == [
        "layer_norm_forward_only",
        "dropout_add_layer_norm_forward_only",
        "layer_norm_forward_only",
        "layer_norm_fwd",
        "dropout_add_layer_norm_fwd",
    ]
    assert all(torch.equal(a, b) and a.grad_fn is None for a, b in zip(frozen, kept, strict=True))


def test_only_inputs_and_statistics_are_saved():
    x, residual = torch.randn(16, 32, requires_grad=True), torch.randn(16, 32)
    weight, bias, x_bias = torch.randn(32), torch.randn(32), torch.randn(32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.1, rng=RNG)
    known = {t.data_ptr() for t in (x, residual, weight, bias, x_bias, RNG)}
    assert sorted(t.shape for t in saved if t.data_ptr() not in known) == [(16,), (16,)]  # mean, rstd


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_no_rows(impl):
    x, parameter = torch.randn(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    for y in (
        ops.layer_norm(x, parameter, parameter, impl=impl),
        ops.dropout_add_layer_norm(x, x, parameter, parameter, x_bias=parameter, dropout_p=0.1, rng=RNG, impl=impl),
        ops.dropout_add(x, x, x_bias=parameter, dropout_p=0.1, rng=RNG, impl=impl),
    ):
        assert y.shape == (0, 8)
        dx, dparameter = torch.autograd.grad(y.sum(), (x, parameter))
        assert dx.shape == (0, 8) and torch.equal(dparameter, torch.zeros(8))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_strided_and_higher_rank_inputs(impl):
    x, residual = torch.randn(4, 64, 6).transpose(1, 2), torch.randn(4, 6, 128)[..., ::2]
    weight, bias, x_bias = (torch.randn(128)[::2] for _ in range(3))
    dy = torch.randn(64, 6, 4).permute(2, 1, 0)
    options = {"dropout_p": 0.3, "rng": RNG, "impl": impl}

    def both(x, residual, weight, bias, x_bias):
        z = ops.dropout_add(x, residual, x_bias=x_bias, **options)
        return ops.dropout_add_layer_norm(z, ops.layer_norm(x, weight, bias, impl=impl), weight, bias, **options)

    strided = (x, residual, weight, bias, x_bias)
    for a, b in zip(
        run(both, [t.contiguous() for t in strided], dy.contiguous()),
        [both(*strided), *run(both, strided, dy)[1:]],
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(ops.layer_norm(x, weight, bias, impl=impl)[1], ops.layer_norm(x[1], weight, bias, impl=impl))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_element_spoils_its_row_only(value, dtype):
    x = torch.randn(3, 40).to(dtype)
    x[1, 37] = value
    weight, bias = torch.randn(40), torch.randn(40)
    y = ops.layer_norm(x, weight, bias, impl="native")
    want = F.layer_norm(x, (40,), weight.to(dtype), bias.to(dtype), EPS)
    assert torch.equal(y.isnan(), want.isnan()) and y[1].isnan().all()


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_opcheck(impl):
    x, residual, dy = (torch.randn(5, 40, requires_grad=True) for _ in range(3))
    weight, bias, x_bias = (torch.randn(40, requires_grad=True) for _ in range(3))
    mean, rstd = torch.randn(5), torch.rand(5)
    check = torch.library.opcheck
    check(op._layer_norm_fwd, (x, weight, bias, EPS, impl))
    plain = [t.detach() for t in (dy, x, residual, weight, bias, x_bias)]
    dy, x0, residual0, weight0, bias0, x_bias0 = plain
    check(op._layer_norm_forward_only, (x0, weight0, bias0, EPS, impl))
    check(op._layer_norm_bwd, (dy, x0, weight0, bias0, mean, rstd, impl), test_utils=FAST_CHECKS)
    check(op._dropout_add_layer_norm_fwd, (x, residual, weight, bias, x_bias, RNG, 1, 26, EPS, impl))
    check(op._dropout_add_fwd, (x, residual, x_bias, RNG, 1, 26, impl))
    check(op._dropout_add_layer_norm_forward_only, (x0, residual0, weight0, bias0, None, RNG, 1, 26, EPS, impl))
    for shift, threshold in ((x_bias0, 0), (None, 26)):
        arguments = (dy, x0, residual0, weight0, bias0, shift, mean, rstd, RNG, 1, threshold, impl)
        check(op._dropout_add_layer_norm_bwd, arguments, test_utils=FAST_CHECKS)
        check(op._dropout_add_bwd, (dy, shift, RNG, 1, threshold, impl), test_utils=FAST_CHECKS)


def test_compiles_without_graph_breaks():
    def block(x, residual, weight, bias):
        z = ops.dropout_add(x, residual, dropout_p=0.1, rng=RNG)
        return ops.dropout_add_layer_norm(
            x, ops.layer_norm(z, weight, bias), weight, bias, dropout_p=0.1, rng=RNG, site=1
        )

    inputs = [torch.randn(6, 32), torch.randn(6, 32), torch.randn(32), torch.randn(32)]
    dy = torch.randn(6, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(block, inputs, dy), run(compiled, inputs, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_gradients_of_x_and_residual_do_not_share_memory(impl):
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    for p in (0.0, 0.5):
        x.grad = residual.grad = None
        ops.dropout_add_layer_norm(
            x, residual, torch.ones(8), torch.zeros(8), dropout_p=p, rng=RNG, impl=impl
        ).square().sum().backward()
        assert x.grad.data_ptr() != residual.grad.data_ptr()


X, C8 = torch.ones(4, 8), torch.ones(8)
BAD = [
    (lambda: ops.layer_norm(X, torch.ones(9), C8), ValueError, r"layer_norm: weight must be \[8\] to match x, got \[9\]"),
    (lambda: ops.layer_norm(X, C8, torch.ones(1, 8)), ValueError, r"layer_norm: bias must be \[8\] to match x, got \[1, 8\]"),
    (lambda: ops.layer_norm(X.long(), C8, C8), TypeError, "layer_norm: x must be floating point, got torch.int64"),
    (lambda: ops.layer_norm(torch.ones(4, 0), torch.ones(0), torch.ones(0)), ValueError, "columns > 0"),
    (lambda: ops.layer_norm(torch.tensor(1.0), C8, C8), ValueError, r"x must be \[rows, columns\]"),
    (lambda: ops.layer_norm(X, C8.double(), C8), TypeError, "weight must be float32 or x's torch.float32, got torch.float64"),
    (lambda: ops.layer_norm(X, C8, C8, -1.0), ValueError, "eps must be >= 0, got -1.0"),
    (lambda: ops.layer_norm(X.double(), C8, C8, impl="triton"), ValueError, "triton takes float32, bfloat16 and float16, got float64"),
    (lambda: ops.layer_norm(X.double(), C8, C8, impl="native"), ValueError, "native takes float32 and bfloat16, got float64"),
    (lambda: ops.dropout_add_layer_norm(X, X[:3], C8, C8), ValueError, r"residual must have x's shape \[4, 8\], got \[3, 8\]"),
    (lambda: ops.dropout_add_layer_norm(X, X.bfloat16(), C8, C8), TypeError, "residual must have x's dtype torch.float32"),
    (lambda: ops.dropout_add_layer_norm(X, X, C8, C8, x_bias=torch.ones(3)), ValueError, r"x_bias must be \[8\]"),
    (lambda: ops.dropout_add_layer_norm(X, X, C8, C8, dropout_p=1.0), ValueError, "dropout_p must be in"),
    (lambda: ops.dropout_add_layer_norm(X, X, C8, C8, dropout_p=0.1, rng=torch.ones(2)), ValueError, "rng must be a dense int64"),
    (lambda: ops.dropout_add(X, X[:, :7]), ValueError, "dropout_add: residual must have x's shape"),
    (lambda: ops.dropout_add(X, X, site=-1), ValueError, "site must be in"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
