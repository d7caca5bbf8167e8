"""specs/compound_grow.md: the feed-forward layer grows by tiling; in float64 on small models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth.small_models import assert_near, gradients, logits, parameters, small
from model.samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.config import OptimConfig, Stage
from stackbert_kernels.growth.apply import grow
from stackbert_kernels.growth.axes import mapped
from stackbert_kernels.growth.feed_forward import CHANGED, tiling, widened
from stackbert_kernels.growth.reshape import reshape
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.train.optim import Optimizer

EQUAL = Stage(steps=1, depth=3, grow="widen")
NOISY = replace(EQUAL, split_noise=0.5)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grown(model: Bert, times: int, stage: Stage = EQUAL, moments=None):
    shape = replace(model.config, inner=times * model.config.inner)
    return widened(model, {} if moments is None else moments, stage, shape, seed=3)


def optimized(model: Bert, steps: int, optimizer: Optimizer | None = None) -> Optimizer:
    if optimizer is None:
        optimizer = Optimizer(model, OptimConfig(lr=1e-2))
        optimizer.set_window(Stage(steps=1, depth=model.depth))
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(seed=step), rng=ops.new_rng(5, step)).loss.backward()
        optimizer.clip(1.0)
        optimizer.step(1e-2)
    return optimizer


def states(model: Bert, steps: int = 3) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in optimized(model, steps).state_dict().items()}


def no_moments(model: Bert) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in Optimizer(model, OptimConfig()).state_dict().items()}


@pytest.mark.parametrize("times", [2, 3])
def test_tiles_as_the_paper_says(times):
    model = small()
    new, _, said = grown(model, times, moments=no_moments(model))
    assert said == {"from_inner": 24, "inner": 24 * times, "copies": times, "copies_have_equal_gradients": True}
    before = parameters(model)
    for name, after in parameters(new).items():
        old, slot = before[name], name.rpartition(".")[2]
        wanted = {
            "inner_weight": torch.cat([old] * times),
            "inner_bias": torch.cat([old] * times),
            "outer_weight": torch.cat([old] * times, 1) / times if old.dim() == 2 else old,
        }.get(slot, old)
        assert torch.equal(after, wanted), name
    assert set(CHANGED) == {"inner_weight", "inner_bias", "outer_weight"}
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("stage", [EQUAL, NOISY], ids=["equal", "noisy"])
@pytest.mark.parametrize("changes", [{}, {"norm": "pre"}, {"embedding": 8}], ids=str)
def test_keeps_the_logits(changes, stage):
    model = small(**changes)
    for times in (2, 3):
        new, *_ = grown(model, times, stage, no_moments(model))
        assert new.config == replace(model.config, inner=times * 24)
        assert_near(logits(new), logits(model))


def test_keeps_the_logits_to_1e_6_in_float32():
    model = tiny(layers=3, hidden=16, heads=2, inner=24, init_std=0.05).eval()
    before = logits(model)
    for stage in (EQUAL, NOISY):
        after = logits(grown(model, 2, stage, no_moments(model))[0])
        assert (after - before).abs().max() <= 1e-6 * before.abs().max()


def test_noisy_shares_differ_and_sum_to_the_whole():
    model = small()
    for times in (2, 3):
        equal, noisy = (parameters(grown(model, times, stage, no_moments(model))[0]) for stage in (EQUAL, NOISY))
        again = parameters(grown(model, times, NOISY, no_moments(model))[0])
        for name, share in equal.items():
            if not name.endswith("outer_weight"):
                assert torch.equal(share, noisy[name]), name
                continue
            off = (noisy[name] - share) / share
            assert 0.25 < off.std() < 0.5  # 0.5 sqrt(1 - 1 / k): their mean is taken off
            assert_near(sum(noisy[name].chunk(times, 1)), sum(share.chunk(times, 1)))
            assert torch.equal(noisy[name], again[name])
    names = [f"bank.layers.{i}.outer_weight" for i in (0, 1)]
    first, second = ((noisy[n] - equal[n]) / equal[n] for n in names)
    assert not torch.allclose(first, second)


def test_both_copies_have_identical_gradients():
    new, *_ = grown(small(), 2, moments=no_moments(small()))
    noisy, *_ = grown(small(), 2, NOISY, no_moments(small()))
    for i in range(3):
        for slot, dim in (("inner_weight", 0), ("inner_bias", 0), ("outer_weight", 1)):
            name = f"bank.layers.{i}.{slot}"
            left, right = gradients(new)[name].chunk(2, dim)
            assert left.any()
            assert_near(left, right, 1e-14)
            if slot != "outer_weight":  # that one's gradient is of what the neurons, still equal, give
                left, right = gradients(noisy)[name].chunk(2, dim)
                assert (left - right).abs().max() > 0.05 * left.abs().max(), name


@pytest.mark.parametrize("stage", [EQUAL, NOISY], ids=["equal", "noisy"])
def test_dropout_does_not_part_equal_copies(stage):
    """There is none between the two products: what is dropped is dropped for both copies' sum."""
    model = tiny(layers=3, hidden=16, heads=2, inner=32).train()
    new, state, _ = grown(model, 2, stage, states(model))
    optimizer = Optimizer(new, OptimConfig(lr=1e-2))
    optimizer.load_state_dict(state)
    optimizer.set_window(Stage(steps=1, depth=3))
    before = parameters(new)
    optimized(new, 8, optimizer)
    for name, after in parameters(new).items():
        if name.endswith("inner_weight"):
            assert not torch.equal(after, before[name])
            left, right = after.chunk(2)
            apart = (left - right).abs().max() / after.abs().max()
            assert apart <= 1e-5 if stage is EQUAL else apart > 1e-3, name


# Moments


@pytest.mark.parametrize("times", [2, 3])
def test_gradients_of_the_grown_model_are_the_mapped_gradients(times):
    model = small(objective="mlm+nsp")
    new, *_ = grown(model, times, moments=no_moments(model))
    wanted, after = mapped(gradients(model), tiling(model, times * 24), gradients=True), gradients(new)
    assert wanted.keys() == after.keys()
    for name, gradient in after.items():
        assert_near(gradient, wanted[name])


def test_moments_follow_and_the_others_stay_bit_for_bit():
    model = tiny(layers=3, hidden=16, heads=2, inner=24)
    before = states(model)
    new, after, _ = grown(model, 2, moments=before)
    Optimizer(new, OptimConfig()).load_state_dict(after)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        slot = name.rpartition(".")[0].rpartition(".")[2]
        old = before[name]
        assert tensor.data_ptr() != old.data_ptr()
        if slot not in CHANGED or name.endswith(".step"):
            assert torch.equal(tensor, old), name
            continue
        assert old.any()
        power = 2 if name.endswith("_sq") else 1
        wanted = torch.cat([old, old], 1) if slot == "outer_weight" else torch.cat([old, old]) / 2**power
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=0)  # roots, squared again


def test_a_model_that_is_still_shallow_grows_on():
    """Rows that no layer reads yet are there for a later growth in depth."""
    model = small(layers=4)
    model.use(2)
    state = no_moments(model)
    stage = Stage(steps=1, depth=2, grow="widen")
    shape = replace(model.config, inner=48)
    new, state, _ = reshape(model, state, stage, shape, [], seed=0, optim=OptimConfig())
    assert (new.depth, len(new.bank)) == (2, 4)
    assert_near(logits(new), logits(model))
    optimizer = Optimizer(new, OptimConfig())
    optimizer.load_state_dict(state)
    assert grow(new, optimizer, Stage(steps=1, depth=4, grow="stack"), seed=0) == [0, 1, 0, 1]
    new.use(4)
    assert torch.equal(new.bank.weights[2:], new.bank.weights[:2])
