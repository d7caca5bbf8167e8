"""specs/stacking.md: depths, the published schedule, what a growth copies, and a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after, trained

from stackbert_kernels.config import ConfigError, ModelConfig, OptimConfig, Stage, TrainConfig
from stackbert_kernels.data.batches import heldout
from stackbert_kernels.plan import plan, relative_step_cost, span_at
from stackbert_kernels.recipes import StackingOptions, stacking
from stackbert_kernels.train import loop


def base(layers: int = 12, steps: int = 400_000, lr: float = 8e-4) -> TrainConfig:
    config = TrainConfig(model=ModelConfig(layers=layers), steps=steps)
    return replace(config, optim=replace(config.optim, lr=lr))


def windows(config: TrainConfig) -> list[tuple[int, int, str | None]]:
    return [(stage.depth, stage.train_from, stage.grow) for stage in config.stages]


def test_three_six_twelve():
    config = stacking(base())
    assert windows(config) == [(3, 0, None), (6, 0, "stack"), (12, 0, "stack")]
    assert [stage.steps for stage in config.stages] == [50_000, 70_000, 280_000]
    assert all(stage.embeddings == "train" and stage.optimizer_state == "reset" for stage in config.stages)


@pytest.mark.parametrize(
    ("layers", "options", "depths"),
    [
        (24, {}, [6, 12, 24]),
        (4, {}, [1, 2, 4]),
        (6, {}, [3, 6]),
        (2, {}, [1, 2]),
        (12, {"start": 6}, [6, 12]),
        (24, {"start": 3}, [3, 6, 12, 24]),
        (12, {"factor": 4}, [3, 12]),
        (9, {"factor": 3}, [1, 3, 9]),
    ],
)
def test_any_depth_that_is_a_multiple(layers, options, depths):
    config = stacking(base(layers, steps=1000), StackingOptions(**options))
    assert [stage.depth for stage in config.stages] == depths
    assert sum(stage.steps for stage in config.stages) == 1000
    assert config.stages[-1].steps == 700


def test_the_published_rates():
    """Values of specs/stacking.md: the rate after so many updates of a stage, and none jumps where a stage begins."""
    spans = plan(stacking(base(), StackingOptions(lr_policy="published")))
    shallow, middle, deep = spans
    rates = [(shallow, 5_000, 4.0005e-4), (shallow, 10_000, 8e-4), (shallow, 30_000, 6.75e-4),
             (middle, 35_000, 4.25e-4), (deep, 279_999, 1.95e-4)]  # fmt: skip
    for span, updates, rate in rates:
        assert span.lr(span.first + updates) == pytest.approx(rate, rel=1e-5)
    for before, after, rate in ((shallow, middle, 5.5e-4), (middle, deep, 3e-4)):
        assert after.lr(after.first) == pytest.approx(rate) == pytest.approx(before.lr(before.last - 1), rel=1e-4)
    longer = plan(stacking(base(steps=920_000), StackingOptions(lr_policy="published", stage_weights=(50, 70, 800))))
    assert (
        longer[-1].lr(120_000 + 400_000) < 3e-4
    )  # the curve is stretched to the stage, as every share of the steps is


def test_a_curve_that_ends_before_its_stage_stays_there():
    stage = Stage(steps=9, depth=12, lr_policy="curve", lr_curve=((0, 0.0), (2, 1.0), (4, 0.5)))
    (span,) = plan(replace(base(steps=9, lr=1.0), stages=(stage,)))
    assert [span.lr(step) for step in range(9)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_global_rate_does_not_see_the_stages():
    config = stacking(base(steps=1000))
    rates = [span_at(plan(config), step).lr(step) for step in range(1000)]
    whole = plan(base(steps=1000))[0]
    assert rates == [whole.lr(step) for step in range(1000)]


def test_layer_steps():
    """3,930 against 4,800 thousand layer-steps, 18.1% fewer."""
    stages = stacking(base()).stages
    assert sum(stage.steps * stage.depth for stage in stages) == 3_930_000
    assert round(1 - 3_930 / 4_800, 3) == 0.181
    longer = stacking(base(steps=520_000), StackingOptions(stage_weights=(50, 70, 400))).stages
    assert sum(stage.steps * stage.depth for stage in longer) == 5_370_000  # of 6,240 thousand, 13.9% fewer
    assert round(1 - 5_370 / 6_240, 3) == 0.139
    config = stacking(base())
    costs = [relative_step_cost(config, stage) for stage in config.stages]
    assert costs[0] < costs[1] < costs[2] == 1.0


REFUSED = [
    ({"factor": 1}, 12, "stacking: factor must be >= 2, got 1"),
    ({"start": -1}, 12, "stacking: start must be >= 0, got -1"),
    ({"init": "copy_top"}, 12, "stacking: init must be one of stack, interleave, identity, random, got 'copy_top'"),
    ({"stage_weights": (1.0, 0.0, 1.0)}, 12, "stacking: stage_weights must be > 0, got (1.0, 0.0, 1.0)"),
    ({"stage_weights": (1.0, 1.0)}, 12, "stacking: stage_weights must have 3 numbers, one a stage (3 -> 6 -> 12 layers), got 2"),
    ({}, 7, "stacking: layers must be start x 2 x 2 ..., got layers 7, no start that fits; starts that fit: none"),
    ({"start": 4}, 12, "stacking: layers must be start x 2 x 2 ..., got layers 12, start 4; starts that fit: 3, 6"),
    ({"lr_policy": "published"}, 6, "stacking: lr_policy published is of three stages, got 2 (3 -> 6 layers)"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "layers", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(given, layers, message):
    with pytest.raises(ConfigError) as error:
        stacking(base(layers), StackingOptions(**given))
    assert str(error.value) == message


def test_refuses_too_few_steps():
    with pytest.raises(ConfigError, match="steps must leave each of 3 stages at least 1, got steps 2"):
        stacking(base(steps=2))


# A run


@pytest.mark.parametrize("state", ["reset", "copy"])
def test_a_run_doubles_its_layers_and_goes_on_bitwise(shards, tmp_path, quick, monkeypatch, state):
    """Layer j + l is layer j bit for bit, heads and embeddings stay as they were, and one step later the copies have parted."""
    config = stacking(settings(shards), StackingOptions(optimizer_state=state, stage_weights=(4, 6, 10)))
    assert [(s.steps, s.depth) for s in config.stages] == [(4, 1), (6, 2), (10, 4)]
    straight = assert_goes_on_bitwise(config, tmp_path, (3, 4, 5, 10, 11))

    entered, use = {}, loop.use

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        always_on = {name: parameter.clone() for name, parameter in model.always_on_parameters().items()}
        entered[span.first] = model.bank.weights.clone(), always_on, optimizer.exp_avg.clone(), optimizer.steps.clone()

    monkeypatch.setattr(loop, "use", remember)
    trained(config, tmp_path / "seen")
    for step, old in ((4, 1), (10, 2)):
        weights, others, exp_avg, counts = entered[step]
        assert torch.equal(weights[old : 2 * old], weights[:old])
        before, after = state_after(straight, step)[0], state_after(straight, step + 1)[0]
        assert all(torch.equal(tensor, before["model"][name]) for name, tensor in others.items())
        assert torch.equal(weights[:old], before["model"]["bank"][:old])
        assert not torch.equal(after["model"]["bank"][old], after["model"]["bank"][0])
        assert torch.equal(exp_avg[old : 2 * old], exp_avg[:old]) and exp_avg[:old].any() == (state == "copy")
        assert counts[: 2 * old].tolist() == [step * (state == "copy")] * 2 * old


def test_the_loss_after_doubling_is_far_below_a_random_models(shards, tmp_path, quick, monkeypatch):
    """Not the loss before: stacking keeps no function. Held-out text, the same batches every time."""
    config = stacking(settings(shards, steps=170, checkpoint_every=200, eval_every=200, keep=2, optim=OptimConfig(lr=3e-3)),
                      StackingOptions(start=2, stage_weights=(15, 2)))  # fmt: skip
    held_out, entered, use = heldout(shards, config.data, "mlm", config.seed), [], loop.use

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        loss, _, count = (
            sum(float(x) for x in figures) for figures in zip(*map(model.evaluate, held_out), strict=True)
        )
        entered.append(loss / count)

    monkeypatch.setattr(loop, "use", remember)
    trained(config, tmp_path / "run")
    before = next(event["eval_loss"] for event in log_of(tmp_path / "run") if event["event"] == "eval")
    random, after = entered
    assert after != before and after < before + 0.2 * (random - before)
