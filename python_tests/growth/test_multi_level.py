"""specs/multi_level.md: identities of coalescing and de-coalescing, the function that width keeps, and interpolation, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth.small_models import EPS, assert_near, gradients, logits, parameters, small

from stackbert_kernels.config import ConfigError, ModelConfig
from stackbert_kernels.growth.axes import mapped, reshaped
from stackbert_kernels.growth.multi_level import coalescing, grouped, interpolated

LARGE = {"layers": 4, "hidden": 32, "heads": 4, "inner": 48}
HALF = {"layers": 2, "hidden": 16, "heads": 2, "inner": 24}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def down(large, groups: str = "adjacent", **small_shape):
    return coalescing(large.config, replace(large.config, **small_shape), layers=groups)


def matrix(axis) -> torch.Tensor:
    """[new, old]: what apply does to a vector as output."""
    return axis.apply(torch.eye(axis.old, dtype=torch.float64), 0, "out")


def test_groups():
    assert grouped(6, 3).sources == ((0, 3), (1, 4), (2, 5))
    assert grouped(6, 3, adjacent=True).sources == ((0, 1), (2, 3), (4, 5))
    assert grouped(6, 2).sources == ((0, 2, 4), (1, 3, 5))
    assert grouped(6, 3).inverse().sources == ((0,), (1,), (2,), (0,), (1,), (2,))
    assert grouped(6, 3, adjacent=True).inverse().sources == ((0,), (0,), (1,), (1,), (2,), (2,))


def test_heads_are_whole():
    maps = coalescing(ModelConfig(**LARGE), ModelConfig(**HALF))
    assert maps.axes["heads"].sources[3] == (3, 3 + 16) and maps.residual.sources[3] == (3, 3 + 16)
    assert maps.axes["qkv"].sources[16 + 9] == (32 + 9, 32 + 16 + 9)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_there_and_back_is_the_identity(groups):
    """F T = 1, R G = 1; as inputs too."""
    for adjacent in (False, True):
        axis = grouped(12, 12 // groups, adjacent=adjacent)
        eye = torch.eye(axis.new, dtype=torch.float64)
        assert_near(matrix(axis) @ matrix(axis.inverse()), eye)
        assert_near(axis.apply(axis.inverse().apply(eye, 0, "in"), 0, "in"), eye)
        assert torch.equal(matrix(axis.inverse()).count_nonzero(1), torch.ones(12, dtype=torch.long))


@pytest.mark.parametrize(("large", "layers"), [(LARGE, "adjacent"), (LARGE, "apart"),
                         ({"layers": 6, "hidden": 48, "heads": 6, "inner": 72}, "adjacent")])  # fmt: skip
def test_coalescing_what_was_decoalesced_gives_it_back(large, layers):
    model = small(**HALF, objective="mlm+nsp")
    maps = coalescing(replace(model.config, **large), model.config, layers=layers)
    again = mapped(mapped(parameters(model), maps.inverse()), maps)
    assert again.keys() == parameters(model).keys()
    for name, tensor in parameters(model).items():
        assert_near(again[name], tensor)


@pytest.mark.parametrize("layers", ["adjacent", "apart"])
def test_in_depth_alone_it_is_exact_to_the_bit(layers):
    model = small(**HALF)
    maps = coalescing(replace(model.config, layers=4), model.config, layers=layers)
    again = mapped(mapped(parameters(model), maps.inverse()), maps)
    assert all(torch.equal(again[name], tensor) for name, tensor in parameters(model).items())


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("large", [{"hidden": 32, "heads": 4, "inner": 48}, {"hidden": 48, "heads": 6, "inner": 72}])
def test_decoalescing_the_width_keeps_the_function(large, norm):
    """To the eps of the norm after the embeddings, which are a half or a third of what they were."""
    model = small(**HALF, norm=norm)
    new = reshaped(model, coalescing(replace(model.config, **large), model.config).inverse())
    assert_near(logits(new), logits(model), EPS)
    assert torch.equal(new.mlm.bias, model.mlm.bias)
    times = large["hidden"] // 16
    assert_near(new.word[:, :16], model.word / times)


def test_decoalescing_the_depth_does_not():
    model = small(**HALF)
    new = reshaped(model, coalescing(replace(model.config, layers=4), model.config).inverse())
    assert (logits(new) - logits(model)).abs().max() > 1e-3


def test_operators_by_hand():
    """W' = F_out W rn(F_in^T), b' = F_out b, embeddings' = g E F^T; and back W' = T_out W rn(T_in^T), embeddings' = E T^T / g."""
    large = small(**LARGE)
    maps = down(large, hidden=16, heads=2, inner=24)
    new = mapped(parameters(large), maps)
    C, I = 32, 48  # noqa: E741
    F = torch.cat([torch.eye(C // 2), torch.eye(C // 2)], 1).double() / 2
    F_inner = torch.cat([torch.eye(I // 2), torch.eye(I // 2)], 1).double() / 2
    old = large.bank.layers[1]
    assert_near(new["bank.layers.1.inner_weight"], F_inner @ old.inner_weight @ (2 * F.T))
    assert_near(new["bank.layers.1.outer_weight"], F @ old.outer_weight @ (2 * F_inner.T))
    assert_near(new["bank.layers.1.inner_bias"], F_inner @ old.inner_bias)
    assert_near(new["bank.layers.1.norm2_weight"], F @ old.norm2_weight)
    assert_near(new["mlm.norm.weight"], F @ large.mlm.norm.weight)
    assert_near(new["word"], 2 * large.word @ F.T)
    query = old.qkv_weight[:C]
    assert_near(new["bank.layers.1.qkv_weight"][: C // 2], F @ query @ (2 * F.T))
    back = mapped(new, maps.inverse())
    T = 2 * F.T
    assert_near(back["bank.layers.1.inner_weight"], 2 * F_inner.T @ new["bank.layers.1.inner_weight"] @ F)
    assert_near(back["word"], new["word"] @ T.T / 2)


def test_layers_are_averaged():
    large = small(**LARGE)
    for layers, pairs in (("adjacent", [(0, 1), (2, 3)]), ("apart", [(0, 2), (1, 3)])):
        new = mapped(parameters(large), down(large, layers, layers=2))
        for i, (a, b) in enumerate(pairs):
            mean = (large.bank.layers[a].qkv_weight + large.bank.layers[b].qkv_weight) / 2
            assert_near(new[f"bank.layers.{i}.qkv_weight"], mean)


def test_gradients_of_the_decoalesced_model_are_the_mapped_ones():
    model = small(**HALF, objective="mlm+nsp")
    maps = coalescing(replace(model.config, hidden=32, heads=4, inner=48), model.config).inverse()
    after, wanted = gradients(reshaped(model, maps)), mapped(gradients(model), maps, gradients=True)
    assert wanted.keys() == after.keys()
    for name, gradient in after.items():
        assert_near(gradient, wanted[name], EPS)


def test_gradients_coalesce_by_the_adjoint():
    """The small model's gradients are those of the large one that de-coalescing would make of it, by the chain rule."""
    model = small(**HALF)
    maps = coalescing(replace(model.config, hidden=32, heads=4, inner=48), model.config)
    large = reshaped(model, maps.inverse())
    small_gradients, large_gradients = gradients(model), gradients(large)
    for name, gradient in mapped(large_gradients, maps, gradients=True).items():
        assert_near(gradient, small_gradients[name], EPS)


# Interpolation


def test_interpolation_at_its_ends_and_between():
    large = small(**LARGE)
    maps = down(large, **HALF)
    before = parameters(large)
    after = mapped(mapped(before, maps), maps.inverse())
    assert all(torch.equal(t, before[name]) for name, t in interpolated(before, after, 0.0).items())
    assert all(torch.equal(t, after[name]) for name, t in interpolated(before, after, 1.0).items())
    for name, tensor in interpolated(before, after, 0.25).items():
        assert_near(tensor, 0.75 * before[name] + 0.25 * after[name])


def test_interpolation_restores_the_rank():
    large = small(**LARGE)
    maps = down(large, **HALF)
    before = parameters(large)
    after = mapped(mapped(before, maps), maps.inverse())
    mixed = interpolated(before, after, 0.5)
    for slot in ("qkv_weight", "out_weight", "inner_weight", "outer_weight"):
        name = f"bank.layers.0.{slot}"
        assert torch.linalg.matrix_rank(after[name]) <= 16
        assert torch.linalg.matrix_rank(mixed[name]) == 32 == torch.linalg.matrix_rank(before[name])


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "multi_level: layers must be a multiple of the smaller model's, got 4 -> 3"),
        ({"inner": 30}, "multi_level: inner must be a multiple of the smaller model's, got 48 -> 30"),
        ({"hidden": 24, "heads": 3}, "multi_level: heads must be a multiple of the smaller model's, got 4 -> 3"),
        ({"hidden": 16}, "multi_level: heads are grouped whole, so both models must have the same head dim (hidden / heads), got 8 -> 4"),
    ],
)  # fmt: skip
def test_refuses_shapes(changes, message):
    large = ModelConfig(**LARGE)
    with pytest.raises(ConfigError) as error:
        coalescing(large, replace(large, **changes))
    assert str(error.value) == message


def test_refuses_other_models_and_numbers():
    one = {"word": torch.ones(2)}
    with pytest.raises(ConfigError, match=r"alpha must be in \[0, 1\], got 1.5"):
        interpolated(one, one, 1.5)
    with pytest.raises(ConfigError, match="both models must have the same parameters"):
        interpolated(one, {"position": torch.ones(2)}, 0.5)
    with pytest.raises(ConfigError, match="layers must be grouped adjacent or apart, got 'pairs'"):
        coalescing(ModelConfig(**LARGE), ModelConfig(**HALF), layers="pairs")
