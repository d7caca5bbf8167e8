"""Recipes: the windows of specs/mslt.md, and every open choice as an option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, settings, state_after, trained

from stackbert_kernels.config import ConfigError, ModelConfig, Stage, TrainConfig
from stackbert_kernels.plan import plan
from stackbert_kernels.recipes import RECIPES, MsltOptions, baseline, mslt
from stackbert_kernels.train import loop

BASE = TrainConfig(steps=1000)


def windows(config: TrainConfig) -> list[tuple[int, int]]:
    return [(stage.depth, stage.train_from) for stage in config.stages]


@pytest.mark.parametrize(("layers", "k"), [(12, 1), (12, 2), (12, 3), (12, 4), (12, 6), (12, 12), (24, 4), (4, 2)])
def test_windows_of_mslt(layers, k):
    config = mslt(TrainConfig(model=ModelConfig(layers=layers), steps=1000), MsltOptions(stages=k))
    m = layers // k
    assert windows(config) == [(i * m, (i - 1) * m) for i in range(1, k + 1)] + [(layers, 0)]
    assert config.recipe == "mslt" and config.stages[-1].name == "joint" and config.stages[-1].steps == 160
    assert sum(stage.steps for stage in config.stages) == 1000


def test_defaults_of_mslt():
    first, second, *_, joint = mslt(BASE).stages
    assert first == Stage(steps=210, depth=3, name="layers 0-2")
    assert second == Stage(
        steps=210, depth=6, train_from=3, grow="copy_top", embeddings="freeze", rewarm=21, name="layers 3-5"
    )
    assert joint == Stage(steps=160, depth=12, rewarm=16, name="joint")


def test_rewarm_is_at_most_a_thousand_steps():
    long = mslt(replace(BASE, steps=1_000_000, stages=()))
    assert [stage.rewarm for stage in long.stages] == [0, 1000, 1000, 1000, 1000]
    assert [stage.rewarm for stage in mslt(BASE, MsltOptions(rewarm=5000)).stages] == [0, 210, 210, 210, 160]


def test_options_of_mslt_reach_the_stages():
    options = MsltOptions(stages=2, joint=0.5, init="identity", embeddings="untie", lr_policy="restart", rewarm=7,
                          optimizer_state="zero", frozen_dropout=False, stage_weights=(1, 3))  # fmt: skip
    first, second, joint = mslt(BASE, options).stages
    assert (first.steps, second.steps, joint.steps) == (125, 375, 500)
    assert (second.grow, second.embeddings, second.rewarm) == ("identity", "untie", 7)
    assert first.embeddings == joint.embeddings == "train"
    for stage in (first, second, joint):
        assert (stage.lr_policy, stage.optimizer_state, stage.frozen_dropout) == ("restart", "zero", False)


@pytest.mark.parametrize("steps", [7, 13, 997, 1000])
def test_no_step_is_lost_to_rounding(steps):
    config = mslt(replace(BASE, steps=steps, stages=()), MsltOptions(stages=3, joint=0.15))
    growth = [stage.steps for stage in config.stages[:-1]]
    assert sum(growth) + config.stages[-1].steps == steps and max(growth) - min(growth) <= 1


def test_one_stage_without_joint_training_is_the_baseline():
    one, whole = mslt(BASE, MsltOptions(stages=1, joint=0.0)), baseline(BASE)
    assert one.stages == whole.stages
    assert [(s.first, s.last, [s.lr(step) for step in range(1000)]) for s in plan(one)] == [
        (s.first, s.last, [s.lr(step) for step in range(1000)]) for s in plan(whole)
    ]


def test_without_joint_training_the_last_growth_stage_ends_the_run():
    assert windows(mslt(BASE, MsltOptions(joint=0.0))) == [(3, 0), (6, 3), (9, 6), (12, 9)]


@pytest.mark.parametrize("retie", ["decoder", "mean"])
def test_the_embedding_is_tied_again_for_joint_training(shards, tmp_path, quick, retie):
    config = mslt(settings(shards), MsltOptions(stages=2, joint=0.2, embeddings="untie", retie=retie))
    assert [stage.retie for stage in config.stages] == ["decoder", "decoder", retie]
    entered, use = {}, loop.use

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        entered[span.first] = model.word.detach().clone(), model.mlm.decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "use", remember)
        trained(config, tmp_path / "seen")
    before = state_after(tmp_path / "seen", 16)[0]["model"]
    word, decoder = before["word"], before["mlm.decoder"]
    assert not torch.equal(word, decoder) and entered[16][1] is None
    assert torch.equal(entered[16][0], decoder if retie == "decoder" else (word + decoder) / 2)
    if retie == "mean":
        assert_goes_on_bitwise(config, tmp_path, (16, 17))


def test_baseline_drops_the_stages_of_its_base():
    config = baseline(mslt(BASE))
    assert config.stages == (Stage(steps=1000, depth=12, name="all layers"),) and config.recipe == "baseline"


def test_a_recipe_is_found_by_name():
    for name, (function, options) in RECIPES.items():
        assert function(BASE, options()).recipe == name


REFUSED = [
    (MsltOptions, {"stages": 0}, "mslt: stages must be >= 1, got 0"),
    (MsltOptions, {"joint": 1.0}, "mslt: joint must be in [0, 1), got 1.0"),
    (MsltOptions, {"init": "stack"}, "mslt: init must be one of copy_top, random, identity, got 'stack'"),
    (
        MsltOptions,
        {"embeddings": "train"},
        "mslt: embeddings must be one of freeze, output_grad, untie, full, got 'train'",
    ),
    (MsltOptions, {"lr_policy": "cosine"}, "mslt: lr_policy must be one of global, restart, got 'cosine'"),
    (MsltOptions, {"optimizer_state": "keep"}, "mslt: optimizer_state must be one of copy, zero, reset, got 'keep'"),
    (MsltOptions, {"embeddings": "untie", "retie": "sum"}, "mslt: retie must be one of decoder, mean, got 'sum'"),
    (MsltOptions, {"retie": "mean"}, "mslt: retie needs embeddings untie, got embeddings 'freeze'"),
    (MsltOptions, {"rewarm": -1}, "mslt: rewarm must be >= 0, got -1"),
    (MsltOptions, {"stage_weights": (1.0,)}, "mslt: stage_weights must have 4 numbers, one a stage, got 1"),
    (MsltOptions, {"stage_weights": (1.0, 0.0, 1.0, 1.0)}, "mslt: stage_weights must be > 0, got (1.0, 0.0, 1.0, 1.0)"),
]


@pytest.mark.parametrize(("make", "given", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(make, given, message):
    with pytest.raises(ConfigError) as error:
        make(**given)
    assert str(error.value) == message


def test_refuses_stages_that_do_not_divide_the_layers():
    with pytest.raises(
        ConfigError,
        match="layers must be divisible by stages, got layers 12, stages 5; stages that fit: 1, 2, 3, 4, 6, 12",
    ):
        mslt(BASE, MsltOptions(stages=5))


def test_refuses_too_few_steps():
    with pytest.raises(
        ConfigError, match=r"steps must leave each of 4 stages and the joint one \(share 0.16\) at least 1, got steps 3"
    ):
        mslt(TrainConfig(steps=3))
