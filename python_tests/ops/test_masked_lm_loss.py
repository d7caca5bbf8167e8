"""masked_lm_loss against F.cross_entropy(F.linear(...)) in float64, for every implementation."""

from __future__ import annotations

import contextlib
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch
from torch.utils._python_dispatch import TorchDispatchMode

from stackbert_kernels import ops
from stackbert_kernels.ops import _triton
from stackbert_kernels.ops.masked_lm_loss import chunks, native, padded
from stackbert_kernels.ops.masked_lm_loss.op import _masked_lm_loss_fwd, _masked_lm_predictions

IMPLEMENTATIONS = ["reference", "native", "triton"]
DTYPES = {  # the interpreter of Triton cuts bfloat16 off instead of rounding it; float16 takes the same path on a GPU
    "reference": (torch.float32, torch.bfloat16),
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16),
}

pytestmark = pytest.mark.filterwarnings(  # what NumPy says in the interpreter
    "ignore:divide by zero encountered in log2:RuntimeWarning", "ignore:All-NaN slice encountered:RuntimeWarning"
)


def triton_kernel():
    from stackbert_kernels.ops.masked_lm_loss import triton_kernel

    return triton_kernel


class Case(NamedTuple):
    rows: int
    columns: int
    vocabulary: int
    ignored: float = 0.0  # share of the rows
    size: float = 1.0  # of the logits; 1e4 overflows exp without the maximum taken off


CASES = [
    Case(1, 1, 1),
    Case(1, 8, 15),  # less than a vector
    Case(3, 5, 17),
    Case(16, 8, 64),  # one whole group of rows
    Case(17, 24, 131, ignored=0.3),
    Case(50, 32, 1000, ignored=0.85),  # labels as transformers has them
    Case(33, 16, 300, size=1e4),
    Case(7, 16, 2100, ignored=0.2),  # three blocks of words of a Triton program
]


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor


def inputs(case: Case, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Inputs:
    hidden = torch.randn(case.rows, case.columns).to(dtype)
    weight = (torch.randn(case.vocabulary, case.columns) * case.size).to(weight_dtype or dtype)
    bias = torch.randn(case.vocabulary).to(weight_dtype or dtype)
    labels = torch.randint(0, case.vocabulary, (case.rows,))
    labels[torch.randperm(case.rows)[: round(case.rows * case.ignored)]] = -100
    return Inputs(*(t.requires_grad_() for t in (hidden, weight, bias)), labels)


def torchs(hidden, weight, bias, labels, dloss):
    loss = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), dloss.to(loss.dtype))]


def ours(hidden, weight, bias, labels, dloss, impl):
    loss = ops.masked_lm_loss(hidden, weight, bias, labels, impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), dloss.to(loss.dtype))]


def doubles(x: Inputs) -> tuple:
    return *(t.detach().double().requires_grad_() for t in x[:3]), x.labels


@pytest.mark.parametrize("case", CASES)
def test_reference_matches_torch_in_float64(case):
    x, dloss = inputs(case, torch.float64), torch.tensor(1.7)
    for actual, exact in zip(ours(*x, dloss, "reference"), torchs(*x, dloss), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("case", "impl", "dtype"),
    [
        (case, impl, dtype)
        for case in CASES
        for impl in DTYPES
        for dtype in DTYPES[impl]  # logits beyond float16; or so few that torch's error is luck
        if dtype != torch.float16 or (case.size == 1 and case.rows > 16)
    ],
)
def test_as_accurate_as_torch(case, impl, dtype):
    x, dloss = inputs(case, dtype), torch.tensor(1.7)
    got, exact = ours(*x, dloss, impl), torchs(*doubles(x), dloss.double())
    assert got[0].dtype == torch.float32
    names = ["loss", "dhidden", "dweight", "dbias"]
    for name, actual, e, baseline in zip(names, got, exact, torchs(*x, dloss), strict=True):
        assert_as_accurate_as_torch(name, actual, e, baseline, slack=2.0 if name == "loss" else 3.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("budget", [1, 2 * 131 * 4, 5 * 131 * 4, 2**30])
def test_chunk_borders_do_not_show(budget, impl, monkeypatch):
    x, dloss = inputs(Case(23, 24, 131, ignored=0.2), torch.float32), torch.tensor(1.0)
    exact = torchs(*doubles(x), dloss.double())
    monkeypatch.setattr(chunks, "LOGITS_BYTES", budget)
    if impl == "triton":
        monkeypatch.setattr(padded, "_logits_bytes", lambda *_: budget)
    for actual, e in zip(ours(*x, dloss, impl), exact, strict=True):
        torch.testing.assert_close(actual.double(), e, rtol=1e-5, atol=1e-6)


def test_logits_stay_within_the_budget(monkeypatch):
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 7 * 100 * 4)
    sizes = [len(logits) for _, logits in chunks.logits_by_chunk(torch.randn(20, 4), torch.randn(100, 4))]
    assert sizes == [7, 7, 6]


@pytest.mark.parametrize(
    ("rows", "sizes"), [(0, []), (3, [3]), (16, [16]), (32, [32]), (33, [32, 1]), (70, [32, 32, 6])]
)
def test_chunks_of_whole_tiles(rows, sizes):
    """At most 40 rows; of the equal sizes that would do, the next multiple of 16."""
    walk = chunks.logits_by_chunk(torch.randn(rows, 4), torch.randn(100, 4), None, 40 * 100 * 4, 16)
    assert [len(logits) for _, logits in walk] == sizes


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_autocast_takes_float32_parameters_with_bfloat16_hidden(impl):
    x = inputs(Case(40, 32, 200, ignored=0.1), torch.bfloat16, weight_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(*x, torch.tensor(1.0), impl)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    low = [t.detach().bfloat16().requires_grad_() for t in x[:3]]
    baseline = torchs(*low, x.labels, torch.tensor(1.0))
    for name, actual, e, b in zip("xhwb", got, torchs(*doubles(x), torch.tensor(1.0)), baseline, strict=True):
        # The weight is rounded to bfloat16 for the products in both.
        assert (actual.double() - e).abs().max() <= 3 * (b.double() - e).abs().max() + 2**-8 * e.abs().max(), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_products_run_in_hiddens_dtype_under_autocast(impl):
    x = inputs(Case(9, 16, 40), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.masked_lm_loss(*x, impl=impl)
    assert torch.equal(inside, ops.masked_lm_loss(*x, impl=impl))


def test_gradcheck():
    *x, labels = inputs(Case(7, 4, 9, ignored=0.3), torch.float64)
    torch.autograd.gradcheck(lambda h, w, b: ops.masked_lm_loss(h, w, b, labels, impl="reference"), x)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    x = inputs(Case(6, 8, 21, ignored=0.3), torch.float32)
    torch.library.opcheck(_masked_lm_loss_fwd, (*x, -100, True, True, True, impl))
    plain = [t.detach() for t in x]
    torch.library.opcheck(_masked_lm_loss_fwd, (*plain, -100, False, False, False, impl))
    torch.library.opcheck(_masked_lm_predictions, (*plain, -100, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_in_one_graph(impl):
    x = inputs(Case(6, 8, 21), torch.float32)

    def step(hidden, weight, bias, labels):
        return 2 * ops.masked_lm_loss(torch.tanh(hidden), weight, bias, labels, impl=impl)

    eager = torch.autograd.grad(step(*x), x[:3])
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*x), x[:3])
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "learns", [(True, False, True), (False, True, False), (False, False, True), (True, False, False)]
)
def test_only_wanted_gradients_are_made(learns, impl):
    *tensors, labels = inputs(Case(20, 8, 50, ignored=0.2), torch.float32)
    full = torch.autograd.grad(ops.masked_lm_loss(*tensors, labels, impl=impl), tensors)
    for tensor, learn in zip(tensors, learns, strict=True):
        tensor.requires_grad_(learn)
    ops.masked_lm_loss(*tensors, labels, impl=impl).backward()
    for tensor, learn, gradient in zip(tensors, learns, full, strict=True):
        if not learn:
            assert tensor.grad is None
        elif impl == "triton":  # has another kernel for a frozen bias, with the sums in another order
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_predict_gives_zero(rows, impl):
    *tensors, labels = inputs(Case(rows, 8, 50), torch.float32)
    loss = ops.masked_lm_loss(*tensors, torch.full_like(labels, -100), impl=impl)
    assert loss.item() == 0.0
    for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))
    total, correct, count = ops.masked_lm_predictions(*tensors, torch.full_like(labels, -100), impl=impl)
    assert (total.item(), correct.item(), count.item()) == (0.0, 0, 0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignored_rows_are_never_read(impl):
    hidden, weight, bias, labels = inputs(Case(20, 8, 50), torch.float32)
    labels[::3] = 7
    clean = torch.autograd.grad(ops.masked_lm_loss(hidden, weight, bias, labels, ignore_index=7, impl=impl), hidden)[0]
    poisoned = hidden.detach().clone()
    poisoned[labels == 7] = float("nan")
    poisoned.requires_grad_()
    loss = ops.masked_lm_loss(poisoned, weight, bias, labels, ignore_index=7, impl=impl)
    assert torch.equal(torch.autograd.grad(loss, poisoned)[0], clean)
    assert (clean[labels == 7] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_bias_of_minus_infinity_takes_a_padded_word_out(impl):
    hidden, weight, bias, labels = inputs(Case(20, 8, 60), torch.float32)
    labels %= 50
    with torch.no_grad():
        bias[50:] = -torch.inf
    dloss = torch.tensor(1.0)
    _, dhidden, dweight, dbias = ours(hidden, weight, bias, labels, dloss, impl)
    short = Inputs(hidden, weight[:50].detach().requires_grad_(), bias[:50].detach().requires_grad_(), labels)
    _, dhidden50, dweight50, dbias50 = torchs(*short, dloss)
    torch.testing.assert_close(dhidden, dhidden50)
    torch.testing.assert_close(dweight[:50], dweight50)
    torch.testing.assert_close(dbias[:50], dbias50)
    assert (dweight[50:] == 0).all() and (dbias[50:] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_nan_shows_in_the_loss(impl):
    hidden, weight, bias, labels = inputs(Case(20, 8, 60), torch.float32)
    with torch.no_grad():
        hidden[3, 2] = float("nan")
    assert ops.masked_lm_loss(hidden, weight, bias, labels, impl=impl).isnan()


@pytest.mark.parametrize("learns", [(True, True, True), (True, True, False)])
def test_triton_with_a_vocabulary_beyond_its_registers(learns, monkeypatch):
    """A row a program, then; the sums over rows are torch's."""
    monkeypatch.setattr(triton_kernel(), "CONFIGURATIONS", {80: triton_kernel().Configuration(4, 4, 2, 4, 32)})
    *tensors, labels = x = inputs(Case(9, 8, 2100, ignored=0.2), torch.float32)
    exact = torchs(*doubles(x), torch.tensor(1.0))
    for tensor, learn in zip(tensors, learns, strict=True):
        tensor.requires_grad_(learn)
    ops.masked_lm_loss(*tensors, labels, impl="triton").backward()
    for tensor, learn, e in zip(tensors, learns, exact[1:], strict=True):
        if learn:
            torch.testing.assert_close(tensor.grad.double(), e, rtol=1e-5, atol=1e-6)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("wrong", [-1, 30, 64, 2**32 + 5, -(2**63)])
def test_triton_answers_a_label_that_is_no_word_with_nan(wrong, monkeypatch):
    """As on a GPU, where the host does not look at the labels: nothing outside of the row is read, and only its gradient is lost."""
    monkeypatch.setattr(chunks, "check_labels", lambda *_: None)
    hidden, weight, bias, labels = inputs(Case(6, 8, 30), torch.float32)
    clean = torch.autograd.grad(ops.masked_lm_loss(hidden, weight, bias, labels, impl="triton"), hidden)[0]
    labels[2] = wrong
    loss = ops.masked_lm_loss(hidden, weight, bias, labels, impl="triton")
    assert loss.isnan()
    got = torch.autograd.grad(loss, hidden)[0]
    assert got[2].isnan().all()
    rest = torch.arange(6) != 2
    assert torch.equal(got[rest], clean[rest])
    total, _, count = ops.masked_lm_predictions(hidden, weight, bias, labels, impl="triton")
    assert total.isnan() and count == 6


@pytest.mark.parametrize("need_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [16, 64, 1040])
def test_triton_writes_inside_its_logits_and_all_of_them(vocabulary, dtype, need_bias):
    rows, guard = 7, 64
    buffers = [
        torch.full((n + 2 * guard,), torch.nan, dtype=t) for n, t in ((rows * vocabulary, dtype), (rows, torch.float32))
    ]
    logits, losses = (b[guard:-guard] for b in buffers)
    logits.copy_(torch.randn(rows * vocabulary))
    labels = torch.randint(0, vocabulary, (rows,))
    labels[0], labels[1] = vocabulary - 1, -100
    cross_entropy = triton_kernel()._CrossEntropy(labels, vocabulary, -100, torch.tensor(6.0))
    assert cross_entropy(logits.view(rows, vocabulary), slice(0, rows), losses, True, need_bias) is None
    for buffer in buffers:
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
        assert not buffer[guard:-guard].isnan().any()
    gradient = logits.view(rows, vocabulary).double()
    assert (gradient[1] == 0).all() and losses[1] == 0
    assert gradient.sum(1).abs().max() < vocabulary * torch.finfo(dtype).eps / 6
    if need_bias:
        torch.testing.assert_close(
            cross_entropy.sums.double().sum(0), gradient.sum(0), rtol=0, atol=rows * torch.finfo(dtype).eps / 6
        )


class Allocations(TorchDispatchMode):
    """The storages that are alive after each operation."""

    def __init__(self):
        super().__init__()
        self.alive, self.history = {}, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        for storage in (tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor)):
            self.alive.setdefault(storage._cdata, (weakref.ref(storage), storage.nbytes()))
        self.alive = {key: held for key, held in self.alive.items() if held[0]() is not None}
        self.history.append({key: nbytes for key, (_, nbytes) in self.alive.items()})
        return result

    def peak(self, *without: torch.Tensor) -> int:
        """Most bytes at a time that are not of these tensors."""
        apart = {tensor.untyped_storage()._cdata for tensor in without}
        return max(sum(nbytes for key, nbytes in alive.items() if key not in apart) for alive in self.history)


@pytest.mark.parametrize("adds_in_float32", [True, False])
@pytest.mark.parametrize("learns", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("vocabulary", [30528, 30522])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_triton_needs_less_than_256_mb(dtype, weight_dtype, vocabulary, learns, adds_in_float32, monkeypatch):
    """Beyond its inputs and their gradients, for 9,830 rows of BERT-base: what is allocated when, without memory (the meta device) and with
    kernels that do nothing. What cuBLAS keeps for itself is not counted."""
    from stackbert_kernels.ops import _triton_column_sums

    class Nothing:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    for module, name in (
        (triton_kernel(), "cross_entropy_kernel"),
        (triton_kernel(), "cross_entropy_row_kernel"),
        (_triton_column_sums, "column_sums_kernel"),
    ):
        monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: 148)  # of a B200: the most there are
    monkeypatch.setattr(chunks, "_adds_in_float32", lambda: adds_in_float32)
    hidden = torch.empty(9830, 768, dtype=dtype, device="meta")
    weight = torch.empty(vocabulary, 768, dtype=weight_dtype, device="meta")
    bias, labels = weight.new_empty(vocabulary), torch.empty(9830, dtype=torch.int64, device="meta")
    with Allocations() as allocations:
        gradients = triton_kernel().masked_lm_loss_fwd(hidden, weight, bias, labels, -100, *learns)
    peak = allocations.peak(hidden, weight, bias, labels, *gradients)
    assert 100e6 < peak < 256e6  # a chunk of logits is more than the lower bound, so this is not blind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("impl", ops.available()["masked_lm_loss"]["cuda"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [30528, 30522, 50265])
def test_cuda(impl, weight_dtype, vocabulary, monkeypatch):
    """Several chunks, with what only a GPU has: bfloat16 that rounds, sums of products in float32."""
    monkeypatch.setattr(padded, "_logits_bytes", lambda *_: 12_000_000)
    x, dloss = inputs(Case(500, 64, vocabulary, ignored=0.1), torch.bfloat16, weight_dtype), torch.tensor(1.7)
    x = Inputs(*(t.detach().cuda().requires_grad_() for t in x[:3]), x.labels.cuda())
    got, exact = ours(*x, dloss.cuda(), impl), torchs(*doubles(x), dloss.cuda().double())
    low = [t.detach().bfloat16().requires_grad_() for t in x[:3]]
    baseline = torchs(*low, x.labels, dloss.cuda())
    for name, actual, e, b in zip(["loss", "dhidden", "dweight", "dbias"], got, exact, baseline, strict=True):
        assert_as_accurate_as_torch(name, actual, e, b, slack=2.0 if name == "loss" else 3.0)
    again = ours(*x, dloss.cuda(), impl)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_cuda_memory(impl):
    if impl not in ops.available()["masked_lm_loss"]["cuda"]:
        pytest.skip(f"no {impl} here")
    hidden = torch.randn(9830, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(30528, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(30528, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 30528, (9830,), device="cuda")
    gradients = sum(t.nbytes for t in (hidden, weight, bias))
    for _ in range(2):  # the first call also allocates what cuBLAS keeps
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = ops.masked_lm_loss(hidden, weight, bias, labels, impl=impl)
        most = torch.cuda.max_memory_allocated() - before
        del loss
    assert most - gradients < 256e6


@pytest.mark.parametrize("vocabulary", [15, 64, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_writes_inside_its_outputs_and_all_of_them(dtype, vocabulary):
    rows, guard = 21, 64
    parts = -(-rows // 16)

    def guarded(n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((n + 2 * guard,), float("nan"), dtype=dtype)

    buffers = [
        guarded(rows * vocabulary, dtype),
        guarded(rows, torch.float32),
        guarded(parts * vocabulary, torch.float32),
    ]
    logits, losses, bias_parts = (b[guard:-guard] for b in buffers)
    logits.copy_(torch.randn(rows * vocabulary))
    labels = torch.randint(0, vocabulary, (rows,))
    labels[0] = vocabulary - 1
    native._cross_entropy(
        logits.view(rows, vocabulary),
        torch.zeros(vocabulary),
        labels,
        losses,
        bias_parts.view(parts, -1),
        None,
        True,
        1.0,
    )
    for buffer in buffers:
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
        assert not buffer[guard:-guard].isnan().any()
    # Probabilities sum to 1, so a row of the gradient sums to 0, but for a rounding of each word.
    allowed = vocabulary * torch.finfo(dtype).eps
    assert logits.view(rows, vocabulary).double().sum(1).abs().max() < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repetition_do_not_change_the_cross_entropy(dtype):
    rows, vocabulary = 100, 517
    start = torch.randn(rows, vocabulary).to(dtype)
    bias, labels = torch.randn(vocabulary), torch.randint(0, vocabulary, (rows,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            logits, losses, parts = start.clone(), torch.empty(rows), torch.empty(-(-rows // 16), vocabulary)
            native._cross_entropy(logits, bias, labels, losses, parts, None, True, 1 / rows)
            results.append((logits, losses, parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("impl", "dtype"), [(impl, dtype) for impl in DTYPES for dtype in DTYPES[impl]])
def test_predictions(dtype, impl, monkeypatch):
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 7 * 37 * 4)
    hidden, weight, bias, labels = inputs(Case(60, 8, 37, ignored=0.2), dtype)
    z = F.linear(hidden.double(), weight.double(), bias.double())
    labels = torch.where((labels != -100) & (torch.rand(60) < 0.5), z.argmax(1), labels)  # so that some are right
    loss, correct, count = ops.masked_lm_predictions(hidden, weight, bias, labels, impl=impl)
    assert loss.dtype == torch.float64 and not loss.requires_grad
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    assert loss.item() == pytest.approx(F.cross_entropy(z, labels, reduction="sum").item(), rel=rounding)
    assert count.item() == 48
    assert correct.item() == pytest.approx((z.argmax(1) == labels).sum().item(), abs=0 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_first_of_equal_words_is_the_prediction(impl):
    hidden, weight, bias = torch.ones(3, 4), torch.zeros(40, 4), torch.zeros(40)
    weight[[5, 30]] = 1.0
    _, correct, _ = ops.masked_lm_predictions(hidden, weight, bias, torch.tensor([5, 30, 2]), impl=impl)
    assert correct.item() == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_inputs(impl):
    x = inputs(Case(12, 16, 30), torch.float32)
    hidden, weight = x.hidden.detach().repeat_interleave(2, 1)[:, ::2], x.weight.detach().t().contiguous().t()
    labels = x.labels.repeat_interleave(2)[::2]
    expected = ops.masked_lm_loss(*x, impl=impl)
    torch.testing.assert_close(ops.masked_lm_loss(hidden, weight, x.bias.detach(), labels, impl=impl), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "hidden must be floating point"),
        ({"hidden": torch.ones(2, 3, 1)}, ValueError, r"hidden must be \[rows, columns\], got \[2, 3, 1\]"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight must be \[vocabulary, 3\] to match hidden, got \[5, 4\]"),
        ({"weight": torch.ones(5, 3, dtype=torch.float64)}, TypeError, "weight must be torch.float32 as hidden"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[5\] to match weight, got \[4\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be \[2\] to match hidden, got \[3\]"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, TypeError, "labels must be int64, got torch.int32"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must be in \[0, 5\) or ignore_index, got 5"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, r"labels must be in \[0, 5\) or ignore_index, got -1"),
        (
            {"hidden": torch.ones(2, 3).double(), "weight": torch.ones(5, 3), "impl": "triton"},
            ValueError,
            "triton takes float32, bfloat16 and float16, got float64; usable: reference",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "hidden": torch.ones(2, 3),
        "weight": torch.ones(5, 3),
        "bias": torch.ones(5),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        ops.masked_lm_loss(**{**arguments, **change})


def test_native_does_not_take_float64():
    assert "native takes float32 and bfloat16, got float64" in str(
        ops.explain("masked_lm_loss", torch.ones(2, 3).double())
    )


def test_the_second_derivative_is_refused():
    hidden, weight, bias, labels = inputs(Case(4, 4, 9), torch.float32)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(ops.masked_lm_loss(hidden, weight, bias, labels), hidden, create_graph=True)
