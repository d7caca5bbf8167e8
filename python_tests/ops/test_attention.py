"""attention: the reference against torch in float64, the kernels against the reference, masks bit for bit, padding never read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.ops import philox
from stackbert_kernels.ops.attention import native
from stackbert_kernels.ops.attention import op as attention_op
from stackbert_kernels.ops.attention.native import _rows

# Rows past a sequence's end are computed as infinities and NaN before they are left out; NumPy, in the interpreter, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

IMPLS = (
    "reference",
    "native",
    "triton",
)  # triton in its interpreter, which needs seconds for what a GPU does in microseconds: small shapes

# Nothing, one token, less than a vector of scores more than two, a panel of keys, one more, several query blocks, a rest of rows.
LENGTHS = (0, 1, 37, 64, 65, 128, 200)
ISAS = ("generic", "avx2", "avx512")
HEAD_DIMS = (16, 32, 64, 80, 128)


def cumulative(lengths) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def qkv_of(lengths, heads: int, head_dim: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, heads, head_dim, dtype=torch.float64, generator=generator).to(dtype)


def by_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths, p: float = 0.0, rng: Tensor | None = None, site: int = 0
) -> Tensor:
    """Packed [T, H, D], a sequence at a time; the mask, where there is one, from ops.philox."""
    out, start = [], 0
    for b, length in enumerate(lengths):
        rows = [x[start : start + length].transpose(0, 1) for x in (q, k, v)]
        start += length
        if p == 0:
            y = F.scaled_dot_product_attention(*rows)
        else:
            kept = philox.attention_bytes(rng, site, b, q.shape[1], length, length) >= round(256 * p)
            factors = kept.to(q.dtype) * philox.scale(round(256 * p))
            y = torch.softmax(rows[0] @ rows[1].transpose(1, 2) * q.shape[-1] ** -0.5, -1) * factors @ rows[2]
        out.append(y.transpose(0, 1))
    return torch.cat(out)


def with_gradient(function, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_reference_is_torchs_attention_in_float64(p):
    lengths, rng = (0, 5, 1, 33), ops.new_rng(3, 4)
    qkv, cu = qkv_of(lengths, 2, 8), cumulative(lengths)
    dy = torch.randn(sum(lengths), 2, 8, dtype=torch.float64)
    ours, dours = with_gradient(
        lambda x: ops.attention_qkv_varlen(x, cu, 40, dropout_p=p, rng=rng, site=5, impl="reference"), qkv, dy
    )
    torchs, dtorchs = with_gradient(lambda x: by_torch(*x.unbind(1), lengths, p, rng, 5), qkv, dy)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)  # float64 rounding of 33 terms
    torch.testing.assert_close(dours, dtorchs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    rng = ops.new_rng(1)
    lengths = torch.tensor([0, 1, 4], dtype=torch.int32)
    x = torch.randn(3, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.attention(q, k, v, lengths, dropout_p=0.3, rng=rng, scale=0.7, impl="reference"),
        tuple(y.clone().detach().requires_grad_() for y in (x, 2 * x, x.sin())),
    )
    packed = torch.randn(5, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y: ops.attention_qkv_varlen(y, cumulative((0, 1, 4)), 6, dropout_p=0.3, rng=rng, impl="reference"),
        packed,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "p"), [*((d, 0.0) for d in HEAD_DIMS), (64, 0.1)])
def test_native_is_as_accurate_as_torch(head_dim, p, dtype):
    rng, cu = ops.new_rng(2**35 + 1, 9), cumulative(LENGTHS)
    qkv = qkv_of(LENGTHS, 2, head_dim, dtype)
    dy = torch.randn(len(qkv), 2, head_dim).to(dtype)

    def ours(impl):
        return lambda x: ops.attention_qkv_varlen(x, cu, 200, dropout_p=p, rng=rng, site=7, impl=impl)

    exact, dexact = with_gradient(ours("reference"), qkv.double(), dy.double())
    baseline, dbaseline = with_gradient(lambda x: by_torch(*x.unbind(1), LENGTHS, p, rng, 7), qkv, dy)
    actual, dactual = with_gradient(ours("native"), qkv, dy)
    assert_as_accurate_as_torch("out", actual, exact, baseline)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_as_accurate_as_torch(name, dactual[:, i], dexact[:, i], dbaseline[:, i], slack=3.0)


def test_scale_and_odd_head_dimensions():
    """Dimensions that end inside a vector, with a scale that is no power of two."""
    for head_dim in (1, 5, 72, 256):
        qkv = qkv_of((3, 70), 1, head_dim, torch.float32)
        dy = torch.randn(73, 1, head_dim)
        run = {
            impl: with_gradient(
                lambda x, i=impl: ops.attention_qkv_varlen(x, cumulative((3, 70)), 70, scale=0.3, impl=i),
                x,
                dy.to(x.dtype),
            )
            for impl, x in (("native", qkv), ("reference", qkv.double()))
        }
        for ours, exact in zip(run["native"], run["reference"], strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5 * exact.abs().max().item())


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that 100 tokens are several, of queries and of keys."""
    triton_kernel = pytest.importorskip("stackbert_kernels.ops.attention.triton_kernel")
    small = triton_kernel.Configuration(
        forward_one_tile=triton_kernel.Tiles(32, 64),
        forward=triton_kernel.Tiles(32, 64),
        backward_one_tile=triton_kernel.Tiles(64, 64),  # two of them: up to 128
        dq=triton_kernel.Tiles(32, 64),
        dkv=triton_kernel.Tiles(32, 64),
    )
    monkeypatch.setattr(triton_kernel, "_configuration", lambda q: small)


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "p", "scale", "tiles"),
    [
        *(((0, 1, 37, 128), 2, head_dim, 0.0, None, "half") for head_dim in (32, 64, 96, 128)),  # one tile
        ((0, 1, 37, 128), 2, 64, 0.1, 0.3, "half"),
        ((37, 60), 1, 32, 0.1, -0.2, "half"),  # one tile of 64; a negative scale turns the order of the scores
        (
            (40, 0, 129, 1),
            1,
            96,
            0.1,
            None,
            "half",
        ),  # several tiles, and in the backward pass sequences of one tile beside them
        ((200,), 1, 64, 0.0, -0.1, "half"),
        ((129,), 1, 64, 0.1, 0.0, "half"),
        ((64, 3), 1, 64, 0.1, None, "single"),
        ((65,), 1, 128, 0.1, None, "single"),
    ],
)
def test_triton_is_as_accurate_as_torch(lengths, heads, head_dim, p, scale, tiles, monkeypatch):
    """Here in fp32, whose tiles are smaller: those of half precision, where every kernel has its own, are taken for most."""
    if tiles == "half":
        triton_kernel = pytest.importorskip("stackbert_kernels.ops.attention.triton_kernel")
        chosen = triton_kernel.CONFIGURATIONS[100][2, 64 if head_dim <= 64 else 128]
        monkeypatch.setattr(triton_kernel, "_configuration", lambda q: chosen)
    rng, cu = ops.new_rng(2**35 + 1, 9), cumulative(lengths)
    qkv = qkv_of(lengths, heads, head_dim, torch.float32)
    dy = torch.randn(len(qkv), heads, head_dim)

    def ours(impl):
        return lambda x: ops.attention_qkv_varlen(
            x, cu, max(lengths), dropout_p=p, rng=rng, site=2**31 + 7, scale=scale, impl=impl
        )

    exact, dexact = with_gradient(ours("reference"), qkv.double(), dy.double())
    baseline, dbaseline = with_gradient(ours("reference"), qkv, dy)  # plain PyTorch in float32
    actual, dactual = with_gradient(ours("triton"), qkv, dy)
    assert_as_accurate_as_torch("out", actual, exact, baseline)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_as_accurate_as_torch(name, dactual[:, i], dexact[:, i], dbaseline[:, i], slack=3.0)


def test_tiles_of_the_triton_kernels_fit_together():
    triton_kernel = pytest.importorskip("stackbert_kernels.ops.attention.triton_kernel")
    for arch, configurations in triton_kernel.CONFIGURATIONS.items():
        for key, chosen in configurations.items():
            tiles = {kernel: getattr(chosen, kernel) for kernel in triton_kernel.KERNELS}
            assert all(t.keys % 64 == 0 for t in tiles.values() if t), (
                f"sm_{arch} {key}: 64 keys share their Philox calls"
            )
            if (one := chosen.backward_one_tile) is not None:
                assert one.keys == one.queries, f"sm_{arch} {key}"
                assert 2 * one.queries % chosen.dq.queries == 0 == 2 * one.queries % chosen.dkv.keys, f"sm_{arch} {key}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [40, 130])
def test_large_scores_do_not_overflow(impl, length):
    x = torch.randn(1, length, 2, 32) * 80
    y, exact = ops.attention(x, x, x, impl=impl), ops.attention(*[x.double()] * 3, impl="reference")
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)  # scores near 4e4, whose fp32 ulp is 4e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_past_the_end_do_not_weigh_on_very_negative_scores(impl):
    """A key of zeros has the score 0, and exp(0 + 4e4) is infinite: a tile that is filled up with such keys must leave them out."""
    x = torch.randn(4, 1, 32) * 80
    cu = cumulative((1, 3))
    y, dx = with_gradient(lambda x: ops.attention_varlen(x, -x, x.sin(), cu, 3, impl=impl), x, torch.randn(4, 1, 32))
    assert torch.isfinite(y).all() and torch.isfinite(dx).all()
    torch.testing.assert_close(y[:1], x[:1].sin())


@pytest.mark.parametrize(("impl", "length"), [("reference", 201), ("native", 201), ("triton", 128), ("triton", 130)])
def test_masks_are_those_of_the_contract(impl, length):
    """With q = k = 0 each probability is 1 / S, and one-hot values spread a row of them over the output."""
    heads, head_dim, p = 2, 64, 0.3
    rng, site = ops.new_rng(2**41 + 3, 2**34 + 1), 2**31 + 5
    cu = cumulative((7, length))
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for first in range(0, length, head_dim):
        qkv = torch.zeros(7 + length, 3, heads, head_dim)
        keys = torch.arange(first, min(first + head_dim, length))
        qkv[7 + keys, 2, :, keys - first] = 1
        y = ops.attention_qkv_varlen(qkv, cu, length, dropout_p=p, rng=rng, site=site, impl=impl)[7:]
        seen[:, :, keys] = y.transpose(0, 1)[:, :, : len(keys)] != 0
    threshold = round(256 * p)
    assert torch.equal(seen, philox.attention_bytes(rng, site, 1, heads, length, length) >= threshold)
    torch.testing.assert_close(y.max().item(), philox.scale(threshold) / length, rtol=1e-6, atol=0)


@pytest.fixture
def poisoned_memory():
    """What torch.empty returns is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in ("reference", "native") for dtype in (torch.float32, torch.bfloat16)]
    + [("triton", torch.float32)],
)
@pytest.mark.parametrize("lengths", [(130, 0, 1, 67), (3, 0, 60)])
def test_padded_and_packed_are_the_same(impl, dtype, lengths, small_tiles, poisoned_memory):
    """Padding holds NaN: one read of it would show. Rows past the length are zero in the output and in the gradients."""
    rng, heads, head_dim = ops.new_rng(6), 1, 32
    longest = max(lengths) + 2
    qkv, cu = qkv_of(lengths, heads, head_dim, dtype), cumulative(lengths)
    dy = torch.randn(len(qkv), heads, head_dim).to(dtype)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded, dy_padded = (
        torch.full((len(lengths), longest, *x.shape[1:]), float("nan"), dtype=dtype) for x in (qkv, dy)
    )
    padded[inside], dy_padded[inside] = qkv, dy

    packed = with_gradient(
        lambda x: ops.attention_qkv_varlen(x, cu, longest, dropout_p=0.1, rng=rng, impl=impl), qkv, dy
    )
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    spread = with_gradient(
        lambda x: ops.attention(*x.unbind(2), seqlens, dropout_p=0.1, rng=rng, impl=impl), padded, dy_padded
    )
    for a, b in zip(packed, spread, strict=True):
        assert torch.equal(b[inside], a) if impl != "reference" else torch.allclose(b[inside], a, rtol=1e-2, atol=1e-2)
        assert (b[~inside] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter_and_nothing_is_copied(impl, monkeypatch):
    qkv, cu = qkv_of((20, 50), 3, 32, torch.float32), cumulative((20, 50))
    views = qkv.unbind(1)
    expected = ops.attention_varlen(*(x.contiguous() for x in views), cu, 50, impl=impl)
    last_strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    assert torch.equal(ops.attention_varlen(*last_strided, cu, 50, impl=impl), expected)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    if impl != "reference":
        monkeypatch.setattr(Tensor, "contiguous", None)
    assert torch.equal(ops.attention_varlen(*views, cu, 50, impl=impl), expected)
    assert torch.equal(ops.attention_varlen(*heads_first, cu, 50, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_views_and_of_an_expanded_output_gradient(impl):
    lengths = (9, 30)
    qkv, cu = qkv_of(lengths, 2, 32, torch.float32).requires_grad_(), cumulative(lengths)
    (fused,) = torch.autograd.grad(ops.attention_qkv_varlen(qkv, cu, 30, impl=impl).sum(), qkv)
    (joined,) = torch.autograd.grad(ops.attention_varlen(*qkv.unbind(1), cu, 30, impl=impl).sum(), qkv)
    assert fused.is_contiguous()
    torch.testing.assert_close(fused, joined, rtol=1e-5, atol=1e-6)


def test_threads_and_repeats_do_not_change_a_bit():
    lengths = (128, 3, 77, 200, 1)
    qkv, cu, rng = qkv_of(lengths, 4, 64, torch.float32), cumulative(lengths), ops.new_rng(8)
    dy = torch.randn(len(qkv), 4, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(
                with_gradient(lambda x: ops.attention_qkv_varlen(x, cu, 200, dropout_p=0.1, rng=rng), qkv, dy)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_stay_inside_their_outputs(isa, head_dim, dtype):
    """On every instruction set: outputs are NaN beforehand, between guard bands of NaN that survive, and right afterwards."""
    if ISAS.index(isa) > ISAS.index(native._C.isa()):
        pytest.skip(f"this machine does not run {isa}")
    lengths, heads = (37, 0, 130), 2
    qkv, cu, rng = qkv_of(lengths, heads, head_dim, dtype), cumulative(lengths), ops.new_rng(0)
    dy = torch.randn(len(qkv), heads, head_dim).to(dtype)
    shapes = {"out": dy.shape, "lse": (heads, len(qkv)), "dqkv": qkv.shape}
    band = 256
    buffers = {
        name: torch.full(
            (torch.Size(s).numel() + 2 * band,), float("nan"), dtype=torch.float32 if name == "lse" else dtype
        )
        for name, s in shapes.items()
    }
    inner = {name: buffers[name][band:-band].view(shape) for name, shape in shapes.items()}
    arguments = (*qkv.unbind(1), inner["out"], inner["lse"], cu, 130, 0.1, rng, 0, 26)
    native._run(native._C.attention_forward, (), *arguments, isa=isa)
    gradients = (_rows(dy), *(_rows(x) for x in inner["dqkv"].unbind(1)))
    native._run(native._C.attention_backward, gradients, *arguments, isa=isa)

    def exactly(x):
        return ops.attention_qkv_varlen(x, cu, 130, dropout_p=0.1, rng=rng, scale=0.1, impl="reference")

    exact = dict(zip(("out", "dqkv"), with_gradient(exactly, qkv.double(), dy), strict=True))
    for name in shapes:
        assert torch.isfinite(inner[name]).all(), name
        assert buffers[name][:band].isnan().all() and buffers[name][-band:].isnan().all(), name
    for name, wanted in exact.items():  # tens of roundings, against the largest value; a wrong mask bit is far outside
        atol = 20 * torch.finfo(dtype).eps * wanted.abs().max().item()
        torch.testing.assert_close(inner[name].double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_no_gradient_stores_no_log_sum_exp(monkeypatch, impl):
    seen = []
    forward = attention_op._attention_qkv_fwd
    monkeypatch.setattr(attention_op, "_attention_qkv_fwd", lambda *a: seen.append(forward(*a)) or seen[-1])
    qkv, cu = qkv_of((5,), 1, 32, torch.float32), cumulative((5,))
    plain = ops.attention_qkv_varlen(qkv, cu, 5, impl=impl)
    with torch.no_grad():
        ops.attention_qkv_varlen(qkv.clone().requires_grad_(), cu, 5, impl=impl)
    trained = ops.attention_qkv_varlen(qkv.clone().requires_grad_(), cu, 5, impl=impl)
    assert [lse.shape for _, lse in seen] == [(0,), (0,), (1, 5)]
    assert torch.equal(plain, trained)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_attend_to(impl):
    none = torch.zeros(1, dtype=torch.int32)
    x = torch.empty(0, 3, 2, 32, requires_grad=True)
    y = ops.attention_qkv_varlen(x, none, 0, impl=impl)
    assert y.shape == (0, 2, 32)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert ops.attention_qkv_varlen(x, torch.zeros(4, dtype=torch.int32), 5, impl=impl).shape == (0, 2, 32)
    assert ops.attention(*[torch.empty(0, 4, 2, 32)] * 3, impl=impl).shape == (0, 4, 2, 32)
    assert ops.attention(*[torch.empty(2, 0, 2, 32)] * 3, impl=impl).shape == (2, 0, 2, 32)
    assert ops.attention(*[torch.ones(2, 4, 2, 32)] * 3, torch.zeros(2, dtype=torch.int32), impl=impl).eq(0).all()


def test_attends_without_lengths_to_everything():
    q, k, v = torch.randn(3, 2, 20, 4, 16).unbind(0)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(ops.attention(q, k, v), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    cu, rng = cumulative((3, 0, 6)), ops.new_rng(1)
    qkv = qkv_of((3, 0, 6), 2, 32, torch.float32)
    settings = (cu, 6, 0.4, rng, 1, 26, True, impl)
    torch.library.opcheck(attention_op._attention_qkv_fwd, (qkv.clone().requires_grad_(), *settings))
    torch.library.opcheck(
        attention_op._attention_fwd, (*(x.clone().requires_grad_() for x in qkv.unbind(1)), *settings)
    )
    padded = [x.view(3, 3, 2, 32).clone().requires_grad_() for x in qkv.unbind(1)]
    lengths = torch.tensor([3, 0, 2], dtype=torch.int32)
    torch.library.opcheck(attention_op._attention_fwd, (*padded, lengths, 3, 0.4, rng, 1, 0, True, impl))


def test_compiles_whole():
    cu, rng = cumulative((3, 6)), ops.new_rng(1)

    def step(x):
        return ops.attention_qkv_varlen(x, cu, 6, dropout_p=0.1, rng=rng).square()

    qkv = qkv_of((3, 6), 2, 8, torch.float32)
    dy = torch.ones(9, 2, 8)
    expected = with_gradient(step, qkv, dy)
    actual = with_gradient(torch.compile(step, fullgraph=True, backend="aot_eager"), qkv, dy)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("cu", "max_seqlen", "error", "message"),
    [
        (int32(0, 4).long(), 4, TypeError, "cu_seqlens must be int32 on cpu, got torch.int64"),
        (int32(), 4, ValueError, r"cu_seqlens must be dense \[B \+ 1\], got \[0\]"),
        (int32(0, 5), 5, ValueError, "cu_seqlens must go from 0 to T = 4, got 0 to 5"),
        (int32(1, 4), 4, ValueError, "cu_seqlens must go from 0 to T = 4, got 1 to 4"),
        (int32(0, 3, 2, 4), 4, ValueError, "cu_seqlens must rise by 0 to max_seqlen = 4 each, got 3, 2 at sequence 1"),
        (int32(0, 4), 3, ValueError, "cu_seqlens must rise by 0 to max_seqlen = 3 each, got 0, 4 at sequence 0"),
        (int32(0, 4), -1, ValueError, "max_seqlen must be >= 0, got -1"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_cu_seqlens(impl, cu, max_seqlen, error, message):
    with pytest.raises(error, match=message):
        ops.attention_varlen(*[torch.ones(4, 2, 32)] * 3, cu, max_seqlen, impl=impl)


def test_bad_input():
    x = torch.ones(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"attention: q must be \[B, S, H, D\], got \[4, 2, 8\]"):
        ops.attention(x[0], x[0], x[0])
    with pytest.raises(ValueError, match=r"attention_varlen: q must be \[T, H, D\], got \[1, 4, 2, 8\]"):
        ops.attention_varlen(x, x, x, int32(0, 4), 4)
    with pytest.raises(ValueError, match=r"attention_qkv_varlen: qkv must be \[T, 3, H, D\], got \[1, 4, 2, 8\]"):
        ops.attention_qkv_varlen(x, int32(0, 4), 4)
    with pytest.raises(TypeError, match=r"q must be floating point, got torch\.int64"):
        ops.attention(x.long(), x, x)
    with pytest.raises(TypeError, match=r"k must be torch\.float32 on cpu as q is, got torch\.bfloat16"):
        ops.attention(x, x.bfloat16(), x)
    with pytest.raises(ValueError, match=r"v must be \[1, 4, 2, 8\] as q is, got \[1, 3, 2, 8\]"):
        ops.attention(x, x, x[:, :3])
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 4\], got 5"):
        ops.attention(x, x, x, int32(5))
    with pytest.raises(ValueError, match=r"lengths must be dense \[1\], got \[2\]"):
        ops.attention(x, x, x, int32(1, 2))
    with pytest.raises(ValueError, match="attention: dropout_p must be in"):
        ops.attention(x, x, x, dropout_p=1.0)
    with pytest.raises(ValueError, match="native takes head dimensions up to 256, got 257; usable: reference"):
        ops.attention(*[torch.ones(1, 1, 1, 257)] * 3, impl="native")
    with pytest.raises(
        ValueError, match="triton takes head dimensions 32, 64, 96, 128, got 80; usable: native, reference"
    ):
        ops.attention(*[torch.ones(1, 1, 1, 80)] * 3, impl="triton")
    with pytest.raises(ValueError, match="triton takes float32, bfloat16 and float16, got float64"):
        ops.attention(*[torch.ones(1, 1, 1, 64).double()] * 3, impl="triton")
    with pytest.raises(ValueError, match="native takes float32 and bfloat16, got float64"):
        ops.attention(*[x.double()] * 3, impl="native")
