"""dropout and the mask contract: native and triton equal the PyTorch reference bit for bit, whatever the thread count."""

from __future__ import annotations

import pytest
import torch

from stackbert_kernels import ops
from stackbert_kernels.ops import philox
from stackbert_kernels.ops.dropout.op import _dropout

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 255), (9, 256), (7, 257), (130, 768)]


def test_philox_matches_the_published_vectors():
    """Philox4x32 known answers with 7 rounds, from Random123's kat_vectors."""

    def words(*values):
        return [torch.tensor(v, dtype=torch.int64) for v in values]

    ones = 0xFFFFFFFF
    got = philox.philox(*words(0, 0), *words(0, 0, 0, 0))
    assert [hex(int(w)) for w in got] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]
    got = philox.philox(*words(ones, ones), *words(ones, ones, ones, ones))
    assert [hex(int(w)) for w in got] == ["0x5207ddc2", "0x45165e59", "0x4d8ee751", "0x8c52f662"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_mask_is_the_reference_mask(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    rng = ops.new_rng(2**40 + 7, 2**33 + 5)
    native = ops.dropout(x, 0.1, rng=rng, site=3, impl="native")
    assert torch.equal(native, ops.dropout(x, 0.1, rng=rng, site=3, impl="reference"))


@pytest.mark.parametrize(
    ("shape", "site"), [*((shape, 3) for shape in SHAPES), ((5, 40), 0), ((5, 40), 1), ((5, 40), 2**32 - 1)]
)
def test_triton_mask_is_the_reference_mask(shape, site):
    """On random numbers, gradient included. Each site is another type of Triton's integers: 1 would be a constant, the last an int64."""
    x, rng = torch.randn(shape, requires_grad=True), ops.new_rng(2**40 + 7, 2**33 + 5)
    dy = torch.randn(shape)
    triton, reference = (ops.dropout(x, 0.1, rng=rng, site=site, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(triton, reference)
    for y in (triton, reference):
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], ops.dropout(dy, 0.1, rng=rng, site=site, impl="reference"))


def test_threads_do_not_change_the_mask():
    x, rng = torch.randn(3000, 100), ops.new_rng(1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.dropout(x, 0.3, rng=rng))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_keep_rate_and_mean_are_those_of_the_realised_probability():
    x = torch.ones(2000, 512)
    y = ops.dropout(x, 0.1, rng=ops.new_rng(5))
    n, drop = x.numel(), 26 / 256
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - drop) < 4 * (drop * (1 - drop) / n) ** 0.5  # 4 sigma of a binomial
    assert y.max().item() == pytest.approx(256 / 230)


def test_masks_differ_by_seed_step_and_site():
    x = torch.ones(64, 64)
    masks = [
        ops.dropout(x, 0.5, rng=ops.new_rng(seed, step), site=site)
        for seed, step, site in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            agree = ((a == 0) == (b == 0)).double().mean().item()
            assert abs(agree - 0.5) < 4 * 0.5 / 64  # independent fair coins agree half the time, 4 sigma of 4096


def test_backward_applies_the_same_mask():
    x = torch.randn(33, 40, requires_grad=True)
    y = ops.dropout(x, 0.25, rng=ops.new_rng(3), site=1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 0, y == 0)


def test_none_draws_from_torchs_generator():
    x = torch.ones(8, 64)
    torch.manual_seed(0)
    first = ops.dropout(x, 0.5)
    second = ops.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, ops.dropout(x, 0.5)) and not torch.equal(first, second)


def test_no_dropout_is_the_identity():
    x = torch.randn(2, 3, 4)
    assert ops.dropout(x, 0.0) is x


def test_empty_and_higher_rank_and_strided_inputs():
    for impl in ("reference", "native", "triton"):
        assert ops.dropout(torch.empty(0, 5), 0.5, impl=impl).shape == (0, 5)
    x = torch.randn(6, 4, 32)
    rng = ops.new_rng(9)
    assert torch.equal(ops.dropout(x, 0.5, rng=rng).view(24, 32), ops.dropout(x.view(24, 32), 0.5, rng=rng))
    wide = torch.randn(6, 64)
    for impl in ("native", "triton"):
        for view in (wide[:, ::2], wide[:, 5:40], wide[:1, :1].expand(6, 5), torch.randn(5, 6).T):
            want = ops.dropout(view.contiguous(), 0.5, rng=rng, impl="reference")
            assert torch.equal(ops.dropout(view, 0.5, rng=rng, impl=impl), want)


def test_opcheck():
    x, rng = torch.randn(5, 40, requires_grad=True), ops.new_rng(0)
    for impl in ("reference", "native", "triton"):
        torch.library.opcheck(_dropout, (x, rng, 1, 26, impl))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": 1.0}, ValueError, r"dropout_p must be in \[0, 0.998\), got 1.0"),
        ({"p": -0.1}, ValueError, "dropout_p"),
        ({"p": 0.1, "site": -1}, ValueError, "site"),
        ({"p": 0.1, "rng": torch.zeros(2)}, ValueError, "rng must be a dense int64"),
        ({"p": 0.1, "impl": "fast"}, ValueError, "no such implementation"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.dropout(torch.ones(2, 2), **arguments)


def test_bad_input():
    with pytest.raises(TypeError, match="floating point"):
        ops.dropout(torch.ones(2, 2, dtype=torch.int64), 0.1)


def test_attention_bytes_are_uniform_and_distinct_by_coordinate():
    bits = philox.attention_bytes(ops.new_rng(0), 0, 1, 2, 5, 130)
    assert bits.shape == (2, 5, 130)
    counts = torch.bincount(philox.attention_bytes(ops.new_rng(0), 0, 0, 4, 64, 256).flatten(), minlength=256).double()
    expected = 4 * 64 * 256 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 255 + 5 * (2 * 255) ** 0.5  # mean 255, deviation sqrt(510)
