"""The cosine between a layer and a teacher: against float64, its range, what it does not depend on, and what learns from it."""

from __future__ import annotations

import pytest
import torch
from model.samples import batch, tiny
from oracle import assert_as_accurate_as_torch
from torch.nn import functional as F

from stackbert_kernels import ops
from stackbert_kernels.model.alignment import mean_cosine


def vectors(T=37, C=48, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, target = torch.randn(T, C, generator=g) + 0.3, 5 * torch.randn(T, C, generator=g) - 1
    return x.to(dtype).requires_grad_(), target.to(dtype)


def value_and_gradient(function, x, target):
    x = x.detach().requires_grad_()
    value = function(x, target)
    value.backward()
    return value.detach(), x.grad


def by_torch(x, target):
    return F.cosine_similarity(x, target, dim=-1).mean()


def test_gradient_in_float64():
    x, target = vectors(5, 7, torch.float64)
    assert torch.autograd.gradcheck(mean_cosine, (x, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torch(dtype):
    """bfloat16 vectors are compared in float32: the value is as exact as that of float32 ones."""
    x, target = vectors(dtype=dtype)
    exact = value_and_gradient(by_torch, x.double(), target.double())
    ours = value_and_gradient(mean_cosine, x, target)
    theirs = value_and_gradient(by_torch, x.float(), target.float())
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert_as_accurate_as_torch("value", ours[0], exact[0], theirs[0])
    assert_as_accurate_as_torch("gradient", ours[1], exact[1], theirs[1].to(dtype))


def test_range():
    """Equal vectors have the cosine 1 and opposite ones -1, never beyond though squares and products are rounded."""
    for seed in range(20):
        x = torch.randn(64, 33, generator=torch.Generator().manual_seed(seed))
        for row in x.split(1):  # of some, the quotient is rounded to more than 1
            assert 1 - 1e-6 < mean_cosine(row, row) <= 1 and -1 <= mean_cosine(row, -row) < -1 + 1e-6
    x, target = vectors()
    assert -1 <= mean_cosine(x, target) <= 1


def test_rescaling_changes_nothing():
    """Either vector by a power of two: no bit of the value changes, and the gradient is divided by what x was multiplied by."""
    x, target = vectors()
    value, gradient = value_and_gradient(mean_cosine, x, target)
    scale = 2.0 ** torch.randint(-8, 9, (37, 1))
    scaled, of_scaled = value_and_gradient(mean_cosine, x * scale, target * scale.flip(0))
    assert torch.equal(value, scaled) and torch.equal(gradient, of_scaled * scale)


def test_a_vector_of_zeros_has_no_direction():
    x, target = vectors(4, 8)
    with torch.no_grad():
        x[1], target[2] = 0, 0
    value, gradient = value_and_gradient(mean_cosine, x, target)
    by_hand = F.cosine_similarity(x.double(), target.double(), dim=-1)[[0, 3]].sum() / 4
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert not gradient[[1, 2]].any() and gradient[[0, 3]].all()


def test_no_token_and_other_shapes():
    assert mean_cosine(torch.zeros(0, 8), torch.zeros(0, 8)).item() == 0
    with pytest.raises(ValueError, match=r"x and target must both be \[T, C\], got \[2, 8\] and \[2, 4\]"):
        mean_cosine(torch.zeros(2, 8), torch.zeros(2, 4))


# The model


def aligned(layer, width=32, **changes):
    """A model in float64 without dropout, what it aligns with, and its output of that call."""
    model = tiny(dropout=0.0, attention_dropout=0.0, **changes).double()
    model.project_to(width)
    target = torch.randn(47, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model, target, model(batch(), align=(layer, target))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("layer", "width"), [(1, 32), (2, 20), (4, 20)])
def test_value_and_gradients_are_those_of_the_layers_up_to_it(layer, width, norm):
    """The truth is a model of so many layers that computes every token; layers above learn nothing from the term."""
    model, target, output = aligned(layer, width, norm=norm)
    output.alignment.backward()
    gradients = model.bank.grads.clone()
    always_on = {name: p.grad for name, p in model.always_on_parameters().items() if p.grad is not None}
    assert not gradients[layer:].any() and gradients[:layer].any(1).all()
    assert set(always_on) >= {"word", "position"} and not any(name.startswith("mlm") for name in always_on)
    assert ("projection" in always_on) == (width != 32)

    model.zero_grad()
    model.use(layer)
    model.final_norm = None
    x = model.encode(batch())
    truth = -by_torch(x if model.projection is None else x @ model.projection.T, target)
    truth.backward()
    assert output.alignment.item() == pytest.approx(truth.item(), rel=1e-12)
    torch.testing.assert_close(gradients, model.bank.grads, rtol=1e-9, atol=1e-13)
    for name, gradient in always_on.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("layer", [2, 4])
def test_other_losses_are_what_they_were(layer):
    """Also where the last layer, otherwise computed at the predicted tokens alone, is read everywhere."""
    model, _, output = aligned(layer, objective="mlm+nsp")
    data = batch(pair=True)
    plain = model(data)
    again = model(data, align=(layer, torch.ones(47, 32, dtype=torch.float64)))
    assert again.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert plain.alignment is None and output.loss is output.mlm_loss


def test_minus_one_where_the_layer_is_the_teacher():
    model = tiny(dropout=0.0, attention_dropout=0.0)
    model.use(2)
    own = model.encode(batch()).detach()
    model.use(4)
    assert -1 <= model(batch(), align=(2, own)).alignment.item() < -1 + 1e-6
    assert -1 <= model(batch(), align=(2, 3 * own)).alignment.item() < -1 + 1e-6


def test_a_weight_of_zero_adds_nothing_bit_for_bit():
    """With dropout: the teacher's term shifts no mask, and 0 times its gradient is none."""

    def gradients(align):
        model = tiny()
        output = model(batch(), rng=ops.new_rng(1, 1), align=align)
        (output.loss if align is None else output.loss + 0.0 * output.alignment).backward()
        return {"bank": model.bank.grads} | {name: p.grad for name, p in model.always_on_parameters().items()}

    plain, zero = gradients(None), gradients((2, torch.randn(47, 32)))
    assert plain.keys() == zero.keys() and all(torch.equal(plain[name], zero[name]) for name in plain)


def test_layers_that_do_not_learn_have_no_tap():
    model = tiny(dropout=0.0)
    model.use(4, 2, "freeze")
    for layer in (0, 2, 5):
        with pytest.raises(ValueError, match="taps must name layers that learn, of 3 to 4, got"):
            model(batch(), rng=ops.new_rng(1), align=(layer, torch.ones(47, 32)))


def test_the_projection():
    """A function of the seed; none where widths agree; not in the export."""
    model, other = tiny(), tiny(seed=1)
    for width, seed in ((0, 0), (32, 0), (20, 0), (20, 3)):
        model.project_to(width, seed)
        assert (model.projection is None) == (width != 20)
    other.project_to(20)
    assert torch.equal(model.projection, other.projection)  # one of that shape stayed, whatever the seed
    model.project_to(24, 3)
    assert model.projection.shape == (24, 32) and "projection" in model.always_on_parameters()
    hf = pytest.importorskip("stackbert_kernels.model.hf")
    assert not any("projection" in name for name, _ in hf.to_transformers(model).named_parameters())
