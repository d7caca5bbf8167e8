"""specs/bert2bert.md: what width growth keeps, in float64 on small models; maps, AKI, depth, moments, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth.small_models import EPS, ROUNDING, SMALL, assert_near, gradients, logits, parameters, shape, small
from model.samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.config import ConfigError, ModelConfig, OptimConfig, Stage
from stackbert_kernels.growth.axes import LAYER, AxisMap, ShapeMap, mapped, mapped_state, reshaped
from stackbert_kernels.growth.width import advanced, stack_top, widening, wider
from stackbert_kernels.train.optim import Optimizer


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Maps


def test_tile_and_random_maps():
    assert wider(3, 8, "tile", 0, "hidden").sources == ((0,), (1,), (2,), (0,), (1,), (2,), (0,), (1,))
    drawn = wider(16, 40, "random", 0, "hidden")
    assert drawn.sources[:16] == tuple((i,) for i in range(16))
    assert drawn.sources != wider(16, 40, "random", 1, "hidden").sources
    assert drawn.sources != wider(16, 40, "random", 0, "inner").sources
    assert drawn.sources == wider(16, 40, "random", 0, "hidden").sources


@pytest.mark.parametrize("choice", ["tile", "random"])
def test_counts_sum_to_the_new_width(choice):
    for old, new in ((16, 16), (16, 24), (16, 32), (5, 17)):
        counts = wider(old, new, choice, 3, "hidden").counts
        assert sum(counts) == new and len(counts) == old and min(counts) >= 1


def test_maps_of_blocks_and_parts():
    heads = AxisMap.of([0, 1, 0], 2)
    assert heads.blocks(2).sources == ((0,), (1,), (2,), (3,), (0,), (1,))
    assert heads.times(2).sources == ((0,), (1,), (0,), (2,), (3,), (2,))
    assert heads.fresh == (2,) and heads.blocks(2).fresh == (4, 5) and heads.times(2).fresh == (2, 5)
    assert not heads.even and AxisMap.of([0, 1, 1, 0], 2).even


def test_depth_is_whole_copies_and_then_the_top():
    assert stack_top(3, 8) == [0, 1, 2, 0, 1, 2, 1, 2]
    assert stack_top(3, 6) == [0, 1, 2, 0, 1, 2]
    assert stack_top(3, 4) == [0, 1, 2, 2]
    assert stack_top(3, 3) == [0, 1, 2]
    for old in range(1, 7):
        for new in range(old, 20):
            n = new % old
            assert stack_top(old, new) == [j % old for j in range(new - n)] + list(range(old - n, old))


def test_apply_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    axis = AxisMap.of([0, 1, 1], 2)
    assert axis.apply(x, 1, "out").tolist() == [[1, 2, 2], [3, 4, 4]]
    assert axis.apply(x, 0, "in").tolist() == [[1, 2], [1.5, 2], [1.5, 2]]
    groups = AxisMap(((0, 1),), 2)
    assert groups.apply(x, 0, "out").tolist() == [[2, 3]] and groups.apply(x, 1, "in").tolist() == [[3], [7]]


# Function preservation


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(
    "grown",
    [
        {"hidden": 32, "heads": 4, "inner": 48},
        {"hidden": 48, "heads": 6, "inner": 72},
        {"hidden": 32, "heads": 4, "inner": 61},
        {"inner": 40},
    ],
    ids=["doubled", "trebled", "inner neurons uneven", "inner neurons alone"],
)
def test_fpi_keeps_the_logits_where_the_residual_stream_is_even(grown, norm):
    model = small(norm=norm)
    new = reshaped(model, widening(model.config, shape(model, **grown)))
    assert (new.config.hidden, new.config.heads, new.config.inner) == tuple(
        grown.get(name, getattr(model.config, name)) for name in ("hidden", "heads", "inner")
    )
    assert_near(logits(new), logits(model))


def test_random_maps_of_heads_and_inner_neurons_are_exact_too():
    model = small()
    maps = widening(model.config, shape(model, hidden=32, heads=4, inner=57), choice="random", seed=6)
    maps = replace(maps, residual=wider(16, 32, "tile", 0, "hidden"))
    assert not maps.heads.even and not maps.inner.even
    assert_near(logits(reshaped(model, maps)), logits(model))


def test_fpi_in_float32_keeps_the_logits_to_1e_5():
    model = tiny(**SMALL, init_std=0.05).eval()
    new = reshaped(model, widening(model.config, shape(model, hidden=32, heads=4, inner=48)))
    before, after = logits(model), logits(new)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


def test_without_the_fix_of_the_tied_decoder_the_logits_double():
    model = small()
    new = reshaped(model, widening(model.config, shape(model, hidden=32, heads=4, inner=48)))
    bias = model.mlm.bias.detach()
    with torch.no_grad():
        new.mlm.norm.weight *= 2
        new.mlm.norm.bias *= 2
    assert_near(logits(new) - bias, 2 * (logits(model) - bias))


def test_the_pair_head_is_kept_too():
    model = small(objective="mlm+nsp")
    new = reshaped(model, widening(model.config, shape(model, hidden=32, heads=4, inner=40)))
    with torch.no_grad():
        before, after = (m(batch(pair=True)) for m in (model, new))
    assert_near(after.pair_loss, before.pair_loss)
    assert_near(after.mlm_loss, before.mlm_loss)


def weighted(weights: torch.Tensor):
    """Layer norms whose mean and variance count each value by `weights`, which sum to 1."""

    def norm(x, weight, bias, eps=1e-12, **_):
        mean = (x * weights).sum(-1, keepdim=True)
        var = ((x - mean).square() * weights).sum(-1, keepdim=True)
        return (x - mean) * (var + eps).rsqrt() * weight + bias

    def join(x, residual, weight, bias, *, x_bias=None, eps=1e-12, **_):
        return norm(x + x_bias + residual, weight, bias, eps)

    def embed(ids, positions, types, word, position, token_type, weight, bias, *, eps, **_):
        return norm(word[ids] + position[positions] + token_type[types], weight, bias, eps)

    return {"layer_norm": norm, "dropout_add_layer_norm": join, "embedding_layer_norm": embed}


@pytest.mark.parametrize("choice", ["tile", "random"])
def test_an_uneven_residual_map_is_exact_with_count_weighted_norms_alone(choice, monkeypatch):
    model = small()
    maps = widening(model.config, shape(model, hidden=24, heads=3, inner=36), choice=choice, seed=1)
    assert not maps.residual.even
    new, before = reshaped(model, maps), logits(model)
    error = (logits(new) - before).abs().max()
    assert error > 1e-3 * before.abs().max()
    counts = torch.tensor(maps.residual.counts, dtype=torch.float64)[torch.tensor(maps.residual.sources).flatten()]
    for name, function in weighted(1 / counts / (1 / counts).sum()).items():
        monkeypatch.setattr(ops, name, function)
    assert_near(logits(new), before)


# AKI


def test_aki_takes_new_heads_and_neurons_from_the_layer_above():
    model = small()
    maps = widening(model.config, shape(model, hidden=24, heads=3, inner=36), choice="random", seed=2)
    fpi, aki = mapped(parameters(model), maps), advanced(parameters(model), maps)
    fresh = {"heads": range(16, 24), "inner": range(24, 36), "qkv": [*range(16, 24), *range(40, 48), *range(64, 72)]}
    changed = set()
    for name in fpi:
        if not name.startswith("bank.layers.") or name.startswith("bank.layers.2."):
            assert torch.equal(aki[name], fpi[name]), name  # the top layer has none above
            continue
        _, _, layer, slot = name.split(".")
        dim, axis = next(((d, a) for d, (a, _) in enumerate(LAYER[slot]) if a != "residual"), (0, None))
        new = torch.tensor(list(fresh.get(axis, [])), dtype=torch.long)
        old = torch.tensor([i for i in range(len(fpi[name]) if dim == 0 else fpi[name].shape[1]) if i not in new])
        assert torch.equal(aki[name].index_select(dim, old), fpi[name].index_select(dim, old)), name
        above = fpi[f"bank.layers.{int(layer) + 1}.{slot}"]
        assert torch.equal(aki[name].index_select(dim, new), above.index_select(dim, new)), name
        changed |= {slot} if not torch.equal(aki[name], fpi[name]) else set()
    assert changed == {"qkv_weight", "qkv_bias", "out_weight", "inner_weight", "inner_bias", "outer_weight"}


def test_aki_keeps_no_function_and_a_wide_enough_model_is_left_alone():
    model = small()
    maps = widening(model.config, shape(model, hidden=32, heads=4, inner=48))
    assert (logits(reshaped(model, maps, advanced)) - logits(model)).abs().max() > 1e-3
    same = widening(model.config, model.config)
    assert all(torch.equal(t, parameters(model)[name]) for name, t in advanced(parameters(model), same).items())


def test_width_comes_before_depth():
    """Layers 3 to 5 and 6, 7 are copies of the widened ones, AKI's top layer included; nothing is aliased."""
    model = small()
    maps = widening(model.config, shape(model, layers=8, hidden=24, heads=3, inner=36))
    new = reshaped(model, maps, advanced)
    wide = advanced(parameters(model), maps.width_alone())
    for i, source in enumerate([0, 1, 2, 0, 1, 2, 1, 2]):
        for slot in LAYER:
            assert torch.equal(getattr(new.bank.layers[i], slot), wide[f"bank.layers.{source}.{slot}"]), (i, slot)
    assert len({p.data_ptr() for p in new.parameters()}) == len(list(new.parameters()))
    mapping = mapped(dict(model.named_parameters()), maps)
    assert not {t.data_ptr() for t in mapping.values()} & {p.data_ptr() for p in model.parameters()}


# Moments


@pytest.mark.parametrize("tied", ["norm", "embeddings"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_of_the_grown_model_are_the_mapped_gradients(norm, tied):
    """The rule of the moments: divided where weights are copied, copied where weights are divided."""
    model = small(objective="mlm+nsp", norm=norm)
    maps = replace(widening(model.config, shape(model, hidden=48, heads=6, inner=61)), tied=tied)
    assert not maps.inner.even
    new = reshaped(model, maps)
    before, after = gradients(model), gradients(new)
    wanted = mapped(before, maps, gradients=True)
    assert wanted.keys() == after.keys() and len(wanted) == len(list(new.parameters()))
    for name, gradient in after.items():
        assert gradient.any(), name
        assert_near(gradient, wanted[name], EPS if tied == "embeddings" else 10 * ROUNDING)


def test_moments_of_a_trained_model_are_those_the_wide_one_would_have():
    """Both models see the same gradients of a constant batch; Adam's moments then agree with the mapped ones."""
    model = small()
    maps = widening(model.config, shape(model, hidden=32, heads=4, inner=48))
    new = reshaped(model, maps)
    stage = Stage(steps=1, depth=3)
    both = []
    for one in (model, new):
        optimizer = Optimizer(one, OptimConfig(weight_decay=0.0))
        optimizer.set_window(stage)
        for seed in (0, 1):
            optimizer.zero_grad()
            one(batch(seed=seed)).loss.backward()
            optimizer.clip(0.0)
            optimizer.step(0.0)  # the moments alone
        both.append({name: t.clone() for name, t in optimizer.state_dict().items()})
    wanted = mapped_state(both[0], maps)
    assert wanted.keys() == both[1].keys()
    for name, tensor in both[1].items():
        assert tensor.any() or name == "skipped", name
        assert_near(tensor, wanted[name])
    assert not all(torch.equal(both[1][name], both[0][name]) for name in both[0] if name.startswith("mlm.bias"))


def test_state_of_a_deeper_model_loads_and_follows_the_layers():
    model = small()
    maps = widening(model.config, shape(model, layers=8, hidden=32, heads=4, inner=48))
    optimizer = Optimizer(model, OptimConfig())
    optimizer.exp_avg.normal_()
    optimizer.exp_avg_sq.uniform_()
    optimizer.steps.copy_(torch.tensor([3.0, 4.0, 5.0]))
    for change in (mapped, advanced):
        new = reshaped(model, maps, change)
        grown = Optimizer(new, OptimConfig())
        grown.load_state_dict(mapped_state(optimizer.state_dict(), maps, change))
        assert grown.steps.tolist() == [3, 4, 5, 3, 4, 5, 4, 5]
        assert torch.equal(grown.exp_avg[4], grown.exp_avg[1]) and torch.equal(grown.exp_avg_sq[7], grown.exp_avg_sq[2])
        bias = grown.state_dict()["bank.layers.0.inner_bias.exp_avg"]
        old = optimizer.state_dict()
        assert torch.equal(bias[:24], old["bank.layers.0.inner_bias.exp_avg"] / 2)
        above = 0 if change is mapped else 1
        assert torch.equal(bias[24:], old[f"bank.layers.{above}.inner_bias.exp_avg"] / 2)
        squared = grown.state_dict()["bank.layers.0.inner_bias.exp_avg_sq"]
        assert_near(squared[:24], old["bank.layers.0.inner_bias.exp_avg_sq"] / 4)


# Refusals

REFUSED = [
    ({"hidden": 8, "heads": 1}, "source: it must not be larger than the model, got hidden 16 -> 8"),
    ({"layers": 2}, "source: it must not be larger than the model, got layers 3 -> 2"),
    ({"inner": 23}, "source: it must not be larger than the model, got inner 24 -> 23"),
    ({"hidden": 32}, "source: heads are copied whole, so it must have the model's head dim (hidden / heads), got 8 -> 16"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(changes, message):
    source = ModelConfig(**SMALL)
    with pytest.raises(ConfigError) as error:
        widening(source, replace(source, **changes))
    assert str(error.value) == message


def test_refuses_maps_that_do_not_cover():
    with pytest.raises(ConfigError, match="every old index must be read, or what it knows is lost; 1 is not"):
        AxisMap.of([0, 0, 2], 3)
    with pytest.raises(ConfigError, match=r"old indices must be in \[0, 2\), got 2"):
        AxisMap.of([0, 1, 2], 2)
    with pytest.raises(ConfigError, match="equally many old ones"):
        AxisMap(((0, 1), (1,)), 2)
    one, two = AxisMap.of([0, 1], 2), AxisMap.of([0, 1, 0], 2)
    with pytest.raises(ConfigError, match="tied 'embeddings' needs a residual map that reads each index equally often"):
        ShapeMap(two, one, one, one, head_dim=1, tied="embeddings")
    with pytest.raises(ConfigError, match=r"only an even one has an inverse, got counts \[1, 2\]"):
        two.inverse()
    model = small()
    maps = widening(shape(model, hidden=8, heads=1), model.config)
    with pytest.raises(ConfigError, match="shape map: hidden must be 8, got 16"):
        reshaped(model, maps)
    with pytest.raises(ConfigError, match="no rule says what becomes of bank"):
        mapped({"bank.layers.0.gate": torch.ones(2)}, maps)
