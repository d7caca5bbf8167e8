"""The CUDA cross entropy on the host: rows that stay on chip, several turns and chunks, rows that do not fit, labels that are no words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch
from simt.twin import SEEDS, Device

from stackbert_kernels.ops.masked_lm_loss import chunks, native, padded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows and vocabulary. Blocks of 32, 96 and 480 threads; the twin has 48, 15 and 3 of them at a time. Of 30,528 words two fp32 rows do not
# fit, of 32,784 none does in any dtype.
SHAPES = [(3, 16), (60, 37), (9, 1040), (35, 4112), (5, 30528), (3, 32784)]


def problem(rows, vocabulary, dtype, size=1.0):
    torch.manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, 8).to(dtype)
    weight, bias = (size * torch.randn(vocabulary, 8)).to(dtype), torch.randn(vocabulary).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[0] = vocabulary - 1
    if rows > 2:
        labels[2] = -100
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}


def run(twin, seed, t, needs=(True, True, True), ignore_index=-100):
    with Device(twin, seed, t):
        return native.masked_lm_loss_fwd_cuda(*t.values(), ignore_index, *needs)


def predict(twin, seed, t, ignore_index=-100):
    with Device(twin, seed, t):
        return native.masked_lm_predictions_cuda(*t.values(), ignore_index)


def torchs(hidden, weight, bias, labels):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = F.cross_entropy(F.linear(*leaves), labels)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_accurate(got, t):
    exact = torchs(*(t[n].double() for n in ("hidden", "weight", "bias")), t["labels"])
    for name, a, e, b in zip(("loss", "dhidden", "dweight", "dbias"), got, exact, torchs(*t.values()), strict=True):
        assert_as_accurate_as_torch(name, a, e, b, slack=2.0 if name == "loss" else 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(twin, shape, dtype):
    t = problem(*shape, dtype)
    seeds = SEEDS if shape[1] <= 1040 else SEEDS[:3] if shape[1] <= 4112 else SEEDS[:2]
    seen = [run(twin, seed, t) for seed in seeds]
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert_accurate(seen[0], t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_would_overflow(twin, dtype):
    t = problem(9, 1040, dtype, size=1e4)
    assert_accurate(run(twin, 0, t), t)


@pytest.mark.parametrize("vocabulary", [1040, 32784])
def test_sums_go_on_over_chunks(twin, vocabulary, monkeypatch):
    t = problem(23, vocabulary, torch.float32)
    whole = run(twin, 0, t)
    monkeypatch.setattr(padded, "_logits_bytes", lambda *_: 5 * vocabulary * 4)
    got = run(twin, 1, t)
    for a, b in zip(got, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [48, 1040, 32784])
def test_only_wanted_gradients_are_made(twin, vocabulary):
    t = problem(7, vocabulary, torch.bfloat16)
    loss, dhidden, dweight, dbias = run(twin, 0, t)
    for needs in ((True, False, False), (False, False, True), (False, False, False)):
        got = run(twin, 1, t, needs)
        if any(needs):  # a loss alone comes from the other kernel, whose sums have another order
            assert torch.equal(got[0], loss)
        torch.testing.assert_close(got[0], loss)
        for need, actual, wanted in zip(needs, got[1:], (dhidden, dweight, dbias), strict=True):
            assert torch.equal(actual, wanted) if need else actual.numel() == 0


@pytest.mark.parametrize("wrong", [-1, 30, 47, 48, 2**32 + 5, -(2**63)])
def test_a_label_that_is_no_word_gives_nan(twin, wrong, monkeypatch):
    """30 words in rows of 64. Nothing outside of the row is read; only this row's gradient is lost."""
    monkeypatch.setattr(chunks, "check_labels", lambda *_: None)
    t = problem(6, 30, torch.bfloat16)
    clean = run(twin, 0, t)
    t["labels"][3] = wrong
    loss, dhidden, _, dbias = run(twin, 0, t)
    assert loss.isnan() and dhidden[3].isnan().all() and dbias.isnan().all()
    rest = torch.arange(6) != 3
    assert torch.equal(dhidden[rest], clean[1][rest])
    total, correct, count = predict(twin, 0, t)
    assert total.isnan() and count == 5 and correct <= 4


def test_ignored_rows_are_never_read(twin):
    t = problem(20, 50, torch.float32)
    t["labels"][2], t["labels"][::3] = 3, 7
    clean = run(twin, 0, t, ignore_index=7)
    t["hidden"][t["labels"] == 7] = torch.nan
    for a, b in zip(run(twin, 1, t, ignore_index=7), clean, strict=True):
        assert torch.equal(a, b)
    assert (clean[1][t["labels"] == 7] == 0).all() and clean[0] > 0


def test_a_nan_shows_in_the_loss(twin):
    t = problem(5, 48, torch.bfloat16)
    t["hidden"][3, 2] = torch.nan
    assert run(twin, 0, t)[0].isnan() and predict(twin, 0, t)[0].isnan()


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_predict(twin, rows):
    t = problem(4, 48, torch.float32)
    t = {**t, "hidden": t["hidden"][:rows], "labels": torch.full((rows,), -100)}
    assert not any(x.any() for x in (*run(twin, 0, t), *predict(twin, 0, t)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [37, 4112, 32784])
def test_predictions(twin, vocabulary, dtype):
    t = problem(12, vocabulary, dtype)
    logits = torch.addmm(t["bias"], t["hidden"], t["weight"].t())  # rounded as the implementation's are
    kept = t["labels"] != -100
    t["labels"][5:] = torch.where(kept[5:], logits[5:].double().argmax(1), -100)
    losses = F.cross_entropy(logits.double(), t["labels"], reduction="sum")
    seen = [predict(twin, seed, t) for seed in (SEEDS if vocabulary == 37 else SEEDS[:2])]
    for loss, correct, count in seen:
        assert loss == seen[0][0]
        assert loss.item() == pytest.approx(losses.item(), rel=1e-5)
        assert (correct.item(), count.item()) == (int((logits.argmax(1) == t["labels"])[kept].sum()), 11)
    assert correct >= 7


def test_the_first_of_equal_words_is_the_prediction(twin):
    weight = torch.zeros(4112, 8)
    weight[[5, 30, 3000]] = 1.0
    t = {
        "hidden": torch.ones(4, 8),
        "weight": weight,
        "bias": torch.zeros(4112),
        "labels": torch.tensor([5, 30, 3000, 6]),
    }
    assert predict(twin, 0, t)[1] == 1
