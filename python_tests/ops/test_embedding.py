"""embedding_layer_norm: against float64 with PyTorch's own error as the measure, and bit for bit the ops that it joins."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from python_tests.oracle import assert_as_accurate_as_torch
from stackbert_kernels import ops
from stackbert_kernels.ops import philox
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES
from stackbert_kernels.ops.embedding import op

EPS = 1e-12
RNG = ops.new_rng(2**40 + 7, 2**33 + 5)
SITE = 3
IMPLS = ("reference", "native", "triton")
ISAS = ["generic", "avx2", "avx512"]
NAMES = ["y", "dword", "dposition", "dtoken_type", "dweight", "dbias"]
FAST_CHECKS = ("test_schema", "test_faketensor")  # what there is to check of an op without autograd


class Case(NamedTuple):
    tokens: int
    columns: int
    rows: tuple[int, int, int] = (97, 24, 2)  # of the word, position and token-type tables
    offset: float = 0.0  # |mean| >> std: a one-pass variance loses its digits here
    tables: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32


CASES = [
    Case(1, 1, (1, 1, 1)),
    Case(3, 7),  # less than a vector
    Case(64, 40),  # one piece of the sums by row, and its borders
    Case(65, 40),
    Case(300, 40, offset=30.0),  # several pieces, several chunks
    Case(300, 33, (3, 5, 2)),  # rows that go on over several pieces
    Case(17, 768),
    Case(130, 40, dtype=torch.bfloat16),  # as under autocast
    Case(130, 40, dtype=torch.float16),
    Case(130, 40, tables=torch.bfloat16, dtype=torch.bfloat16),
]
# The interpreter of Triton is slow, and cuts bits off a bfloat16 instead of rounding. Pieces: test_triton_sums_by_row.
TRITON_CASES = [Case(1, 1, (1, 1, 1)), Case(3, 7), Case(19, 40, offset=30.0), Case(5, 72, dtype=torch.float16)]


def case_id(case: Case) -> str:
    return f"{case.tokens}x{case.columns}-{case.rows[0]}-{str(case.tables)[6:]}-{str(case.dtype)[6:]}"


every_case = pytest.mark.parametrize(
    ("case", "impl"),
    [
        pytest.param(case, impl, id=f"{case_id(case)}-{impl}")
        for impl in IMPLS
        for case in (TRITON_CASES if impl == "triton" else CASES)
    ],
)


def inputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Indices, with one frequent word as [MASK] is; tables and the norm's parameters."""
    words, positions, types = case.rows
    ids = torch.randint(0, words, (case.tokens,))
    ids[torch.rand(case.tokens) < 0.3] = words // 2
    indices = [ids, torch.arange(case.tokens) % positions, torch.randint(0, types, (case.tokens,))]
    tables = [(torch.randn(n, case.columns) + case.offset).to(case.tables) for n in case.rows]
    return indices, [*tables, *(torch.randn(case.columns) for _ in range(2))]


def run(function, indices, parameters, dy):
    """Output and the gradient of every parameter."""
    parameters = [p.detach().clone().requires_grad_() for p in parameters]
    y = function(*indices, *parameters)
    return [y.detach(), *torch.autograd.grad(y, parameters, dy.to(y.dtype))]


def composite(ids, positions, token_types, word, position, token_type, weight, bias, *, p=0.0, dtype=None):
    """The same in torch's own ops."""
    x = F.embedding(ids, word) + F.embedding(positions, position) + F.embedding(token_types, token_type)
    y = F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), EPS)
    y = y if dtype is None else y.to(dtype)
    return y * philox.row_factors(RNG, SITE, round(256 * p), y).to(y.dtype) if p else y


@pytest.mark.parametrize("p", [0.0, 0.1])
@every_case
def test_matches_float64(case, impl, p):
    indices, parameters = inputs(case)
    dy = torch.randn(case.tokens, case.columns).to(case.dtype)
    wide = [t.double() for t in parameters]
    exact = run(lambda *a: composite(*a, p=p), indices, wide, dy)
    options = {"dropout_p": p, "rng": RNG, "site": SITE}
    ours = run(lambda *a: ops.embedding_layer_norm(*a, dtype=case.dtype, impl=impl, **options), indices, parameters, dy)
    theirs = run(lambda *a: composite(*a, p=p, dtype=case.dtype), indices, parameters, dy)
    for name, a, e, t in zip(NAMES, ours, exact, theirs, strict=True):
        assert a.dtype == t.dtype
        assert_as_accurate_as_torch(name, a, e, t, slack=2.0 if name == "y" else 3.0)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 7), (70, 768), (300, 33)])
def test_forward_is_bit_for_bit_what_it_joins(shape, p):
    """The model's results of before, in float32: the sum in this order, layer_norm, dropout at the same coordinates."""
    indices, parameters = inputs(Case(*shape))
    word, position, token_type, weight, bias = parameters
    x = F.embedding(indices[0], word) + F.embedding(indices[1], position) + F.embedding(indices[2], token_type)
    joined = ops.dropout(ops.layer_norm(x, weight, bias, impl="native"), p, rng=RNG, site=SITE, impl="native")
    options = {"dropout_p": p, "rng": RNG, "site": SITE, "impl": "native"}
    assert torch.equal(ops.embedding_layer_norm(*indices, *parameters, **options), joined)


def test_gradcheck_of_the_reference():
    indices, parameters = inputs(Case(9, 5, (4, 3, 2)))
    parameters = [p.double().requires_grad_() for p in parameters]
    options = {"dropout_p": 0.3, "rng": RNG, "site": SITE, "impl": "reference"}
    torch.autograd.gradcheck(lambda *p: ops.embedding_layer_norm(*indices, *p, **options), parameters)


@pytest.mark.parametrize(
    ("impl", "shape", "dtype"),
    [
        ("reference", (37, 300), torch.float32),
        ("native", (37, 300), torch.float32),
        ("native", (37, 300), torch.bfloat16),
        ("triton", (5, 72), torch.float32),
    ],
)
def test_masks_are_those_of_dropout(impl, shape, dtype):
    """weight 0 and bias 1 make the output the mask itself; with dy = 1 the gradient of bias counts what backward kept."""
    indices, (*tables, weight, bias) = inputs(Case(*shape))
    bias = torch.ones_like(bias).requires_grad_()
    options = {"dropout_p": 0.1, "rng": RNG, "site": SITE, "impl": impl, "dtype": dtype}
    y = ops.embedding_layer_norm(*indices, *tables, torch.zeros_like(weight), bias, **options)
    want = philox.row_factors(RNG, SITE, 26, y)
    assert torch.equal(y, want.to(dtype))
    kept = torch.autograd.grad(y, bias, torch.ones_like(y))[0] / philox.scale(26)
    torch.testing.assert_close(kept, (want != 0).sum(0).float())


def test_bits_do_not_depend_on_threads_or_repetition():
    case = Case(3000, 96, (50, 24, 2))
    indices, parameters = inputs(case)
    dy = torch.randn(case.tokens, case.columns)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(
                run(
                    lambda *a: ops.embedding_layer_norm(*a, dropout_p=0.1, rng=RNG, impl="native"),
                    indices,
                    parameters,
                    dy,
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "ids",
    [
        [5] * 26,  # one row over all pieces
        [0, 1] * 13,
        [7] * 8 + [3] * 8 + [9] * 8,  # rows that end where a piece does
        [7] * 9 + [3] * 8 + [9] * 9,
        list(range(26)),
        [4] * 3 + [6] * 21 + [4] * 2,
        [2] * 8,  # a single piece
    ],
)
def test_triton_sums_by_row(monkeypatch, ids):
    """Pieces of 8 tokens, 3 loaded at once, two blocks of columns; the pieces of a row are joined two at a time."""
    triton_kernel = pytest.importorskip("stackbert_kernels.ops.embedding.triton_kernel")
    monkeypatch.setattr(triton_kernel, "JOIN", {"COLUMNS": 16, "PIECES": 2})
    index, dz, table = torch.tensor(ids), torch.randn(len(ids), 20), torch.zeros(27, 20)
    sums = triton_kernel._sums_by_row(index, dz, table, triton_kernel.Sums(8, 16, 3))
    exact = torch.zeros(27, 20, dtype=torch.float64).index_add_(0, index, dz.double())
    torch.testing.assert_close(sums.double(), exact, rtol=0, atol=26 * 2**-24 * dz.abs().max().item() * 26)
    assert (sums[[i for i in range(27) if i not in ids]] == 0).all()
    outside = torch.where(index == ids[0], -(2**40), index)  # -1 after a cut to 16 bits would be a row of another table
    sums = triton_kernel._sums_by_row(
        torch.where(index == ids[-1], 27, outside), dz, table, triton_kernel.Sums(8, 16, 3)
    )
    exact[[ids[0], ids[-1]]] = 0
    torch.testing.assert_close(sums.double(), exact, rtol=0, atol=26 * 2**-24 * dz.abs().max().item() * 26)


def test_triton_an_index_out_of_range_gives_a_row_of_nan(monkeypatch):
    """What happens on a GPU: no memory is read for it, no other token notices, and no row of that table gets its gradient."""
    triton_kernel = pytest.importorskip("stackbert_kernels.ops.embedding.triton_kernel")
    indices, parameters = inputs(Case(5, 8, (6, 6, 6)))
    options = {"dropout_p": 0.5, "rng": RNG, "impl": "triton"}
    good = ops.embedding_layer_norm(*indices, *parameters, **options)
    monkeypatch.setattr(triton_kernel, "check_values", lambda indices, tables: None)
    for place in range(3):
        for value in (-1, 6, 2**40):
            wrong = [i.clone() for i in indices]
            wrong[place][2] = value
            y, *gradients = run(lambda *a: ops.embedding_layer_norm(*a, **options), wrong, parameters, torch.ones(5, 8))
            assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])
            assert gradients[place].isfinite().all()
            assert gradients[(place + 1) % 3].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_no_token_reads_get_zero(impl):
    indices, parameters = inputs(Case(10, 8, (1000, 24, 2)))
    indices[0] = torch.tensor([999, 0, 500, 0, 0, 7, 999, 7, 0, 0])
    dword = run(lambda *a: ops.embedding_layer_norm(*a, impl=impl), indices, parameters, torch.randn(10, 8))[1]
    read = torch.zeros(1000, dtype=torch.bool).index_fill(0, indices[0], True)
    assert (dword[~read] == 0).all() and (dword[read] != 0).all()


def guarded(shape, dtype, guard=64):
    """A poisoned tensor inside a larger poisoned buffer, and the buffer."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * guard,), torch.nan, dtype=dtype)
    return buffer[guard : guard + count].view(shape), buffer


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (3, 7), (129, 40), (64, 259)])
def test_kernels_stay_inside_their_outputs(tokens, columns, dtype, isa):
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this machine does not run {isa}")
    indices, parameters = inputs(Case(tokens, columns, tables=dtype))
    *tables, weight, bias = parameters
    dy = torch.randn(tokens, columns).to(dtype)
    sizes = {"table_rows": [len(t) for t in tables], "tokens": tokens, "columns": columns, "isa": isa, "threads": 2}
    sizes |= {"table_dtype": NATIVE_DTYPES[dtype], "dtype": NATIVE_DTYPES[dtype]}
    sizes |= {"rng": RNG.data_ptr(), "site": SITE, "threshold": 26}
    sizes |= {"ids": [t.data_ptr() for t in indices], "tables": [t.data_ptr() for t in tables]}

    outputs = {"y": guarded((tokens, columns), dtype), "dz": guarded((tokens, columns), torch.float32)}
    outputs |= {n: guarded((tokens,), torch.float32) for n in ("mean", "rstd")}
    outputs |= {n: guarded((columns,), torch.float32) for n in ("dweight", "dbias")}
    outputs |= {n: guarded(t.shape, dtype) for n, t in zip(NAMES[1:4], tables, strict=True)}
    address = {n: tensor.data_ptr() for n, (tensor, _) in outputs.items()}
    spaces = [_C.row_workspace(tokens, columns, 0), _C.embedding_workspace(tokens, columns)]
    spaces = [torch.full((size + 64,), torch.nan) for size in spaces]
    order = torch.full((_C.embedding_order(tokens, sum(sizes["table_rows"])) + 8,), -7)
    _C.embedding_fwd(
        weight=weight.data_ptr(), bias=bias.data_ptr(), **{n: address[n] for n in ("y", "mean", "rstd")}, workspace=spaces[0].data_ptr(),
        eps=EPS, **sizes,
    )  # fmt: skip
    _C.embedding_bwd(
        dy=dy.data_ptr(), weight=weight.data_ptr(), **{n: address[n] for n in ("mean", "rstd", "dweight", "dbias", "dz")},
        dtables=[address[n] for n in NAMES[1:4]], order=order.data_ptr(), workspace=spaces[1].data_ptr(), **sizes,
    )  # fmt: skip
    for _, buffer in outputs.values():
        assert buffer[:64].isnan().all() and buffer[-64:].isnan().all() and not buffer[64:-64].isnan().any()
    assert all(s[-64:].isnan().all() for s in spaces) and (order[-8:] == -7).all()

    # float64 from the same (rounded) inputs; half an ulp of the dtype for the final rounding, and what fp32 sums lose
    exact = [t.double() for t in parameters]
    y, mean, rstd = op._embedding_layer_norm_fwd(*indices, *exact, RNG, SITE, 26, EPS, torch.float64, "reference")
    wants = op._embedding_layer_norm_bwd(dy.double(), *indices, *exact, mean, rstd, RNG, SITE, 26, "reference")
    for name, want in {"y": y, "mean": mean, "rstd": rstd, **dict(zip(NAMES[1:], wants, strict=True))}.items():
        got = outputs[name][0]
        scale = want.abs().max() if columns > 1 else 1.0  # one column: the gradients are zero
        assert (got.double() - want).abs().max() <= (torch.finfo(got.dtype).eps + 2e-6) * scale, name


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stackbert":
            self.names.append(func._schema.name.removeprefix("stackbert::"))
        return func(*args, **(kwargs or {}))


def test_a_frozen_embedding_takes_the_forward_only_kernel():
    indices, parameters = inputs(Case(40, 8))
    with Calls() as calls:
        frozen = ops.embedding_layer_norm(*indices, *parameters, dropout_p=0.5, rng=RNG)
        parameters[0].requires_grad_()
        with torch.no_grad():
            ops.embedding_layer_norm(*indices, *parameters)
        kept = ops.embedding_layer_norm(*indices, *parameters, dropout_p=0.5, rng=RNG)
    assert calls.names == [*["embedding_layer_norm_forward_only"] * 2, "embedding_layer_norm_fwd"]
    assert torch.equal(frozen, kept) and frozen.grad_fn is None and kept.grad_fn is not None


def test_only_inputs_and_statistics_are_saved():
    indices, parameters = inputs(Case(16, 32))
    parameters = [p.requires_grad_() for p in parameters]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.embedding_layer_norm(*indices, *parameters, dropout_p=0.1, rng=RNG)
    known = {t.data_ptr() for t in (*indices, *parameters, RNG)}
    assert sorted(t.shape for t in saved if t.data_ptr() not in known) == [(16,), (16,)]  # mean, rstd


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    _, parameters = inputs(Case(1, 8))
    none = torch.zeros(0, dtype=torch.int64)
    y, *gradients = run(
        lambda *a: ops.embedding_layer_norm(*a, dropout_p=0.1, rng=RNG, impl=impl),
        [none] * 3,
        parameters,
        torch.ones(0, 8),
    )
    assert y.shape == (0, 8)
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(gradients, parameters, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_higher_rank_inputs(impl):
    indices, parameters = inputs(Case(24, 16))
    strided = [torch.stack([i.view(4, 6), i.view(4, 6)], 2)[..., 0] for i in indices]
    wide = [torch.stack([p, p], -1)[..., 0] for p in parameters]
    assert not any(t.is_contiguous() for t in (*strided, *wide))
    dy = torch.randn(6, 16, 4).permute(2, 0, 1)
    function = lambda *a: ops.embedding_layer_norm(*a, dropout_p=0.3, rng=RNG, impl=impl)  # noqa: E731
    dense = run(function, indices, parameters, dy.reshape(24, 16))
    y = function(*strided, *[p.requires_grad_() for p in wide])
    assert torch.equal(y, dense[0].view(4, 6, 16))
    for a, b in zip(torch.autograd.grad(y, wide, dy), dense[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [-1, 24, 2**40])
@pytest.mark.parametrize("place", range(3))
def test_an_index_out_of_range_is_an_error_on_the_cpu(impl, value, place):
    indices, parameters = inputs(Case(7, 8, (24, 24, 24)))
    indices[place][6] = value
    name = ("ids", "positions", "token_types")[place]
    with pytest.raises(ValueError, match=rf"embedding_layer_norm: {name} must be in \[0, 24\), got {value}"):
        ops.embedding_layer_norm(*indices, *parameters, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_and_compile(impl):
    indices, parameters = inputs(Case(9, 8))
    tail = (RNG, 1, 26, EPS)
    check = torch.library.opcheck
    arguments = (*indices, *[p.clone().requires_grad_() for p in parameters], *tail)
    check(op._embedding_layer_norm_fwd, (*arguments, torch.float32, impl))
    check(op._embedding_layer_norm_fwd, (*arguments, torch.bfloat16, impl), test_utils=FAST_CHECKS)
    check(op._embedding_layer_norm_forward_only, (*indices, *parameters, *tail, torch.bfloat16, impl))
    backward = (torch.randn(9, 8), *indices, *parameters, torch.randn(9), torch.rand(9), RNG, 1, 26, impl)
    check(op._embedding_layer_norm_bwd, backward, test_utils=FAST_CHECKS)

    def embed(*a):
        return ops.embedding_layer_norm(*a, dropout_p=0.1, rng=RNG, impl=impl) * 2

    dy = torch.randn(9, 8)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(embed, indices, parameters, dy), run(compiled, indices, parameters, dy), strict=True):
        assert torch.equal(a, b)


INDEX, T, C8 = torch.zeros(4, dtype=torch.int64), torch.zeros(5, 8), torch.ones(8)
GOOD = {
    "ids": INDEX,
    "positions": INDEX,
    "token_types": INDEX,
    "word": T,
    "position": T,
    "token_type": T,
    "weight": C8,
    "bias": C8,
}
BAD = [
    ({"ids": INDEX.int()}, TypeError, "ids must be int64, got torch.int32"),
    ({"positions": INDEX[:3]}, ValueError, r"positions must have the shape of ids, \[4\], got \[3\]"),
    ({"word": T.long()}, TypeError, "word must be floating point, got torch.int64"),
    ({"position": T[:, :7]}, ValueError, r"position must be \[rows, C\] with rows and C > 0 and word's C, got \[5, 7\]"),
    ({"token_type": T[:0]}, ValueError, r"token_type must be \[rows, C\].*got \[0, 8\]"),
    ({"word": T[0]}, ValueError, r"word must be \[rows, C\]"),
    ({"position": T.double()}, TypeError, "position must have word's dtype torch.float32, got torch.float64"),
    ({"weight": torch.ones(9)}, ValueError, r"weight must be \[8\] to match word, got \[9\]"),
    ({"bias": C8.double()}, TypeError, "bias must be float32 or word's torch.float32, got torch.float64"),
    ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    ({"dtype": torch.int8}, TypeError, "dtype must be floating point, got torch.int8"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
    ({"site": -1}, ValueError, "site must be in"),
    ({"rng": torch.ones(2)}, ValueError, "rng must be a dense int64"),
    ({"impl": "fast"}, ValueError, "no such implementation"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"embedding_layer_norm: .*{message}"):
        ops.embedding_layer_norm(**(GOOD | changes))
