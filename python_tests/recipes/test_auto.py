"""Recipe auto: which depths, how the steps are shared out, what a growth copies, and a whole run."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from train.runs import assert_goes_on_bitwise, settings, state_after, trained

from stackbert_kernels.config import ConfigError, ModelConfig, TrainConfig
from stackbert_kernels.plan import plan, span_at
from stackbert_kernels.recipes import AutoOptions, auto
from stackbert_kernels.train import loop

DEPTHS = [[1, 2], [1, 3], [1, 2, 4], [1, 3, 6], [1, 7], [2, 4, 8], [1, 3, 9], [1, 5, 10], [3, 6, 12], [6, 12, 24]]


def base(layers: int = 12, steps: int = 1000) -> TrainConfig:
    return TrainConfig(model=ModelConfig(layers=layers), steps=steps)


@pytest.mark.parametrize("depths", DEPTHS, ids=str)
def test_a_quarter_and_half_of_the_layers_or_what_comes_nearest(depths):
    stages = auto(base(depths[-1]), AutoOptions(shares=(2, 1, 5))).stages
    assert [stage.depth for stage in stages] == depths
    assert [stage.steps for stage in stages] == ([250, 125, 625] if len(depths) == 3 else [375, 625])
    assert [stage.grow for stage in stages] == [None] + ["stack"] * (len(depths) - 1)
    assert all(stage.train_from == 0 and stage.optimizer_state == "copy" for stage in stages)


def test_every_depth_has_a_schedule():
    for layers in range(2, 100):
        depths = [stage.depth for stage in auto(base(layers)).stages]
        assert depths[-1] == layers and all(old < new and new % old == 0 for old, new in pairwise(depths))


def test_the_rate_does_not_see_the_growth():
    spans, whole = plan(auto(base())), plan(base())[0]
    assert all(span_at(spans, step).lr(step) == whole.lr(step) for step in range(1000))


REFUSED = [
    ({"shares": (1.0, 1.0)}, 12, 9, "auto: shares must be 3 numbers > 0, one a stage, got (1.0, 1.0)"),
    ({"shares": (1.0, 0.0, 1.0)}, 12, 9, "auto: shares must be 3 numbers > 0, one a stage, got (1.0, 0.0, 1.0)"),
    ({"shares": (1.0, float("nan"), 1.0)}, 12, 9, "auto: shares must be 3 numbers > 0, one a stage, got (1.0, nan, 1.0)"),
    ({}, 1, 9, "auto: layers must be at least 2, got 1"),
    ({}, 12, 2, "auto: steps must leave each of 3 stages at least 1, got steps 2"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "layers", "steps", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(given, layers, steps, message):
    with pytest.raises(ConfigError) as error:
        auto(base(layers, steps), AutoOptions(**given))
    assert str(error.value) == message


def test_a_run_grows_with_its_optimizer_state_and_goes_on_bitwise(shards, tmp_path, quick, monkeypatch):
    config = auto(settings(shards), AutoOptions(shares=(4, 6, 10)))
    assert [(stage.steps, stage.depth) for stage in config.stages] == [(4, 1), (6, 2), (10, 4)]
    straight = assert_goes_on_bitwise(config, tmp_path, (3, 4, 5, 10, 11))

    entered, use = {}, loop.use

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        entered[span.first] = model.bank.weights.clone(), optimizer.exp_avg.clone(), optimizer.steps.clone()

    monkeypatch.setattr(loop, "use", remember)
    trained(config, tmp_path / "seen")
    for step, old in ((4, 1), (10, 2)):
        weights, exp_avg, counts = entered[step]
        assert torch.equal(weights[:old], state_after(straight, step)[0]["model"]["bank"][:old])
        for of_layers in (weights, exp_avg):
            assert torch.equal(of_layers[old : 2 * old], of_layers[:old]) and of_layers[:old].any()
        assert counts[: 2 * old].tolist() == [step] * 2 * old
