"""specs/incremental_training.md: both phases, the paper's cost identities by summation over steps, and a whole run."""

from __future__ import annotations

import pytest
import torch
from train.runs import assert_goes_on_bitwise, settings, state_after

from stackbert_kernels.config import ConfigError, ModelConfig, Stage, TrainConfig
from stackbert_kernels.plan import step_cost
from stackbert_kernels.recipes import IncrementalOptions, incremental


def base(layers: int = 12, steps: int = 1000) -> TrainConfig:
    return TrainConfig(model=ModelConfig(layers=layers), steps=steps)


def test_two_phases_a_stage_then_continual_training():
    config = incremental(base(), IncrementalOptions(stages=3, continual=0.4))
    assert [(s.depth, s.train_from, s.grow, s.embeddings, s.steps, s.name) for s in config.stages] == [
        (4, 0, None, "train", 100, "layers 0-3"),
        (4, 0, None, "train", 100, "all 4"),
        (8, 4, "random", "freeze", 100, "layers 4-7"),
        (8, 0, None, "train", 100, "all 8"),
        (12, 8, "random", "freeze", 100, "layers 8-11"),
        (12, 0, None, "train", 100, "all 12"),
        (12, 0, None, "train", 400, "continual"),
    ]
    assert config.recipe == "incremental"


def test_options_reach_the_stages():
    options = IncrementalOptions(
        stages=2,
        continual=0.0,
        init="identity",
        embeddings="untie",
        lr_policy="restart",
        rewarm=5,
        optimizer_state="zero",
    )
    first, _, alone, together = incremental(base(), options).stages
    assert first == Stage(steps=250, depth=6, lr_policy="restart", optimizer_state="zero", name="layers 0-5")
    assert (alone.grow, alone.embeddings, alone.rewarm) == ("identity", "untie", 5) and together.rewarm == 5


@pytest.mark.parametrize(
    ("layers", "stages", "depths"), [(12, 8, [2, 3, 4, 6, 8, 9, 10, 12]), (12, 12, list(range(1, 13)))]
)
def test_layers_that_do_not_divide_are_spread(layers, stages, depths):
    config = incremental(base(layers), IncrementalOptions(stages=stages, continual=0.0))
    assert [s.depth for s in config.stages[::2]] == depths == [s.depth for s in config.stages[1::2]]


def cost(stages: tuple[Stage, ...], b: float) -> float:
    """In layer forwards, step by step, without the head."""
    return sum(step_cost(stage.depth, stage.train_from, backward=b) for stage in stages for _ in range(stage.steps))


@pytest.mark.parametrize(
    ("S", "continual", "one", "two"),
    [(4, 0.46875, 0.531, 0.500), (8, 0.546875, 0.453, 0.417), (12, 0.572917, 0.427, 0.389)],
)
def test_cost_identities(S, continual, one, two):
    """C_inc / C_base = (3S + 5) / (8S) with b = 1, (S + 2) / (3S) with b = 2; T_cont = 5/8 (1 - 1/S) T spends the rest (b = 1)."""
    L, T = 24, 2 * 12 * 96  # whole phases for every S
    stages = incremental(base(L, T), IncrementalOptions(stages=S, continual=0.0)).stages
    whole = {b: step_cost(L, 0, backward=b) * T for b in (1.0, 2.0)}
    assert cost(stages, 1.0) / whole[1.0] == pytest.approx((3 * S + 5) / (8 * S)) == pytest.approx(one, abs=5e-4)
    assert cost(stages, 2.0) / whole[2.0] == pytest.approx((S + 2) / (3 * S)) == pytest.approx(two, abs=5e-4)
    assert round(5 / 8 * (1 - 1 / S), 6) == continual

    longer = incremental(base(L, round(T * (1 + continual))), IncrementalOptions(stages=S)).stages
    assert sum(s.steps for s in longer[:-1]) == pytest.approx(T, abs=1) and longer[-1].name == "continual"
    assert cost(longer, 1.0) == pytest.approx(whole[1.0], rel=1e-3)


def test_one_stage_costs_what_ordinary_training_does():
    config = incremental(base(12, 100), IncrementalOptions(stages=1))
    assert [(s.steps, s.depth, s.train_from) for s in config.stages] == [(50, 12, 0), (50, 12, 0)]
    assert cost(config.stages, 1.0) == 2 * 100 * 12


REFUSED = [
    ({"stages": 0}, {}, "incremental: stages must be >= 1, got 0"),
    ({"continual": 1.0}, {}, "incremental: continual must be in [0, 1), got 1.0"),
    ({"rewarm": -1}, {}, "incremental: rewarm must be >= 0, got -1"),
    ({"init": "stack"}, {}, "incremental: init must be one of random, identity, copy_top, got 'stack'"),
    ({"stages": 13}, {}, "incremental: layers must be at least stages, got layers 12, stages 13"),
    ({}, {"steps": 9}, "incremental: steps must leave each of 8 phases and continual training (share 0.319) at least 1, got steps 9"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(given, changes, message):
    with pytest.raises(ConfigError) as error:
        incremental(base(**changes), IncrementalOptions(**given))
    assert str(error.value) == message


def test_a_run_trains_new_layers_alone_then_all_and_goes_on_bitwise(shards, tmp_path, quick):
    config = incremental(settings(shards), IncrementalOptions(stages=2, continual=0.2))
    assert [s.steps for s in config.stages] == [4, 4, 4, 4, 4]
    straight = assert_goes_on_bitwise(config, tmp_path, (4, 8, 9, 12, 16))
    at = {step: state_after(straight, step)[0]["model"] for step in (8, 12, 16)}
    assert torch.equal(at[8]["bank"][:2], at[12]["bank"][:2]) and torch.equal(at[8]["word"], at[12]["word"])
    assert not torch.equal(at[12]["bank"][:2], at[16]["bank"][:2]) and not torch.equal(at[12]["word"], at[16]["word"])
