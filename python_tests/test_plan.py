"""The plan: where stages stand, their learning rates, and the numbers of specs/common.md and specs/mslt.md."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from stackbert_kernels import plan as planning
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, Stage, TrainConfig
from stackbert_kernels.plan import cost_table, flops_per_step, flops_per_token, plan, span_at, step_cost
from stackbert_kernels.recipes import MsltOptions, mslt

TWENTY_OF_128 = DataConfig(mask_rate=20 / 128)
BASE = TrainConfig(model=ModelConfig(vocab_size=30522, objective="mlm+nsp"), data=TWENTY_OF_128, steps=1000)
LARGE = TrainConfig(
    model=ModelConfig(layers=24, hidden=1024, heads=16, vocab_size=30522, objective="mlm+nsp"),
    data=TWENTY_OF_128,
    steps=1000,
)


def test_spans_cover_the_run():
    spans = plan(mslt(BASE))
    assert [(s.first, s.last) for s in spans] == [(0, 210), (210, 420), (420, 630), (630, 840), (840, 1000)]
    assert [s.grows for s in spans] == [False, True, True, True, False]
    assert all(span_at(spans, step).first <= step < span_at(spans, step).last for step in range(1000))
    assert (
        spans[1].name == "layers 3-5"
        and plan(TrainConfig(steps=1, stages=(Stage(steps=1, depth=12),)))[0].name == "stage 1"
    )
    with pytest.raises(ValueError, match=r"step must be in \[0, 1000\), got 1000"):
        span_at(spans, 1000)
    with pytest.raises(ValueError, match=r"step must be in \[0, 210\) of layers 0-2, got 210"):
        spans[0].lr(210)


# --- learning rate ---


def rates(config: TrainConfig) -> list[float]:
    spans = plan(config)
    return [span_at(spans, step).lr(step) for step in range(config.steps)]


def test_global_schedule_does_not_see_the_stages():
    config = replace(BASE, optim=OptimConfig(lr=1e-3, warmup=100))
    assert rates(mslt(config, MsltOptions(rewarm=0))) == rates(config)


def test_global_schedule_is_continuous_and_ends_near_zero():
    config = replace(BASE, optim=OptimConfig(lr=1e-3, warmup=100))
    lr = rates(mslt(config, MsltOptions(rewarm=0)))
    assert lr[0] == pytest.approx(1e-5) and lr[99] == lr[100] == 1e-3 and lr[-1] == pytest.approx(1e-3 / 900)
    assert max(abs(b - a) for a, b in itertools.pairwise(lr)) <= 1e-3 / 100 * (1 + 1e-9)
    assert lr[550] == pytest.approx(5e-4)


def test_lans_schedule():
    """Its phase 1: 3,519 steps to 0.00675, of them 42.65% warm-up and 27.35% constant. The warm-up's step t is our t - 1; from there on
    ours is a step later."""
    steps, eta = 3519, 0.00675
    parts = (0.4265 * steps, 0.2735 * steps)
    for t, rate in ((1, 4.5e-6), (750, 0.0033731)):
        assert eta * planning.schedule(t - 1, steps, *parts) == pytest.approx(rate, rel=1e-3 if t == 1 else 1.5e-5)
    for t, rate in ((1501, eta), (2463, eta), (3000, 0.0033184), (3519, 0.0)):
        assert eta * planning.schedule(t, steps, *parts) == pytest.approx(rate, rel=1.5e-5)
    lr = rates(replace(BASE, optim=OptimConfig(lr=1e-3, warmup=100, constant=300)))
    assert lr[98] < lr[99] == lr[400] == 1e-3 and lr[250] == 1e-3 > lr[401] and lr[700] == pytest.approx(5e-4)
    assert lr[-1] == pytest.approx(1e-3 / 600)


def test_a_stage_of_its_own_has_its_share_of_the_constant_part():
    config = replace(BASE, optim=OptimConfig(lr=1e-3, warmup=100, constant=300))
    lr = rates(mslt(config, MsltOptions(lr_policy="restart")))
    span = plan(mslt(config, MsltOptions(lr_policy="restart")))[1]
    share = round(300 * span.stage.steps / 1000)
    warmup = span.stage.rewarm or round(100 * span.stage.steps / 1000)
    own = lr[span.first : span.last]
    assert own[warmup - 1] == own[warmup + share] == 1e-3 > own[warmup + share + 1]


def test_warmup_of_zero_is_two_percent():
    assert planning.warmup_steps(BASE) == 20 and planning.warmup_steps(replace(BASE, steps=10, stages=())) == 1
    lr = rates(BASE)
    assert lr[19] == lr[20] == 1e-4 and lr[0] == pytest.approx(1e-4 / 20)


def test_rewarm_rises_to_the_schedule():
    whole = rates(BASE)
    lr = rates(mslt(BASE, MsltOptions(rewarm=10)))
    for first in (210, 420, 630, 840):
        assert lr[first - 1] == whole[first - 1]
        assert [lr[first + i] / whole[first + i] for i in range(12)] == pytest.approx(
            [0.1 * min(i + 1, 10) for i in range(12)]
        )


def test_restart_gives_each_stage_its_own_schedule():
    lr = rates(mslt(BASE, MsltOptions(lr_policy="restart", rewarm=10, stages=2, joint=0.0)))
    assert lr[0] == pytest.approx(1e-4 / 10) and lr[9] == lr[10] == 1e-4 and lr[499] == pytest.approx(1e-4 / 490)
    assert lr[500] == pytest.approx(1e-4 / 10) and lr[509] == lr[510] == 1e-4 and lr[999] == pytest.approx(1e-4 / 490)
    one = TrainConfig(model=BASE.model, steps=1000, stages=(Stage(steps=1000, depth=12, lr_policy="restart"),))
    assert rates(one) == rates(BASE)


# --- cost in layer forwards: the tables of specs/mslt.md ---


def stage_costs(k: int, layers: int, head: float = 0.0) -> list[float]:
    m = layers // k
    whole = step_cost(layers, 0, head=head)
    return [step_cost(i * m, (i - 1) * m, head=head) / whole for i in range(1, k + 1)]


def speed_up(costs: list[float], joint: float) -> float:
    return 1 / ((1 - joint) * sum(costs) / len(costs) + joint)


@pytest.mark.parametrize(("k", "layers"), [(1, 12), (2, 12), (3, 12), (4, 12), (6, 12), (8, 24)])
def test_stage_costs_without_head(k, layers):
    assert stage_costs(k, layers) == pytest.approx([(i + 2) / (3 * k) for i in range(1, k + 1)])


def test_speed_ups_without_head():
    joint = (0, 0.05, 0.10, 0.15, 0.16, 0.20, 0.30)
    assert [round(speed_up(stage_costs(4, 12), r), 2) for r in joint] == [2.67, 2.46, 2.29, 2.13, 2.11, 2.00, 1.78]
    assert [round(speed_up(stage_costs(8, 24), r), 2) for r in (0, 0.05, 0.10, 0.15, 0.20, 0.30)] == [
        3.69,
        3.25,
        2.91,
        2.63,
        2.40,
        2.04,
    ]


@pytest.mark.parametrize(
    ("config", "head", "costs", "speed_ups"),
    [
        (BASE, 0.516, [0.281, 0.361, 0.441, 0.521], [2.17, 2.04, 1.92]),
        (LARGE, 0.393, [0.262, 0.344, 0.426, 0.508], [2.24, 2.10, 1.97]),
    ],
    ids=["base", "large"],
)
def test_costs_with_head(config, head, costs, speed_ups):
    measured = planning.head_cost(config.model, config.data)
    assert round(measured, 3) == head
    layers = config.model.layers
    assert [round(c, 3) for c in stage_costs(4, layers, measured)] == costs
    assert [round(speed_up(stage_costs(4, layers, measured), r), 2) for r in (0.10, 0.15, 0.20)] == speed_ups
    stages = mslt(config).stages
    assert [round(planning.relative_step_cost(config, s), 3) for s in stages] == [*costs, 1.0]


@pytest.mark.parametrize(
    ("config", "share", "default"), [(None, 0.162, 2.11), (BASE, 0.126, 2.01), (LARGE, 0.148, 2.07)]
)
def test_the_joint_share_of_the_papers_speed_up(config, share, default):
    """More than 110% faster for as many steps: the joint share that gives 2.1x, and what the default of 16% gives; None = without head."""
    layers = 12 if config is None else config.model.layers
    costs = stage_costs(4, layers, 0.0 if config is None else planning.head_cost(config.model, config.data))
    mean = sum(costs) / 4
    assert round((1 / 2.1 - mean) / (1 - mean), 3) == share
    assert round(speed_up(costs, 0.16), 2) == default


def test_backward_of_one_forward():
    """b = 1 is what incremental training counts with."""
    assert step_cost(6, 3, backward=1.0) == 9 and step_cost(6, 3) == 12


# --- parameters: specs/common.md section 3 ---


@pytest.mark.parametrize(
    ("config", "layer", "embeddings", "heads", "total"),
    [
        (BASE, 7_087_872, 23_837_184, 622_650 + 592_130, 110_106_428),
        (LARGE, 12_596_224, 31_782_912, 1_082_170 + 1_051_650, 336_226_108),
    ],
    ids=["base", "large"],
)
def test_parameter_counts(config, layer, embeddings, heads, total):
    model = config.model
    assert planning.layer_parameters(model) == layer
    assert planning.embedding_parameters(model, 30522) == embeddings
    assert planning.head_parameters(model, 30522) == heads
    assert planning.trainable_parameters(config, planning.baseline_stage(config)) == total


def test_all_reduce_volume_of_the_stages():
    """Million parameters: 46.3 in stage 1, 22.5 with frozen embeddings, 45.9 where the decoder learns."""
    for policy, millions in (("freeze", [46.3, 22.5, 22.5, 22.5]), ("output_grad", [46.3, 45.9, 45.9, 45.9])):
        stages = mslt(BASE, MsltOptions(embeddings=policy)).stages[:4]
        assert [round(planning.trainable_parameters(BASE, s) / 1e6, 1) for s in stages] == millions


# --- floating-point operations ---


def test_flops_of_a_whole_step_by_hand():
    """C 8, I 32, S 16, V 100, half of the tokens masked, two layers."""
    config = TrainConfig(
        model=ModelConfig(layers=2, hidden=8, heads=2, vocab_size=100, max_position=16),
        data=DataConfig(seq_len=16, batch_tokens=16, mask_rate=0.5),
        steps=1,
    )
    qkv, attention, rest = 2 * 3 * 64, 4 * 16 * 8, 2 * 64 + 2 * 2 * 8 * 32
    head = 0.5 * (2 * 64 + 2 * 8 * 100)
    whole = 3 * (qkv + attention + rest) + 3 * (qkv + attention + rest / 2) + 3 * head
    assert flops_per_token(config, config.stages[0]) == whole
    assert flops_per_step(config, plan(config)[0]) == 16 * whole

    def top_layer(policy):
        return flops_per_token(config, Stage(steps=1, depth=2, train_from=1, embeddings=policy))

    forward = (qkv + attention + rest) + (qkv + attention + rest / 2) + head
    backward_of_top = qkv + 2 * attention + 2 * rest / 2  # nothing below wants the gradient of the qkv product's input
    transform, decoder = 0.5 * 2 * 64, 0.5 * 2 * 8 * 100
    assert top_layer("freeze") == forward + backward_of_top + 2 * transform + decoder
    assert top_layer("output_grad") == top_layer("untie") == top_layer("freeze") + decoder
    assert top_layer("full") == top_layer("untie") + qkv + (qkv + 2 * attention + rest)


def test_flops_of_a_sentence_pair_objective():
    mlm = replace(BASE, model=replace(BASE.model, objective="mlm"))
    stage = BASE.stages[0]
    C = 768
    more_rows, pooler = 3 * (2 * C * C + 4 * C * 4 * C) / 128, 3 * (2 * C * C + 4 * C) / 128
    assert flops_per_token(BASE, stage) - flops_per_token(mlm, stage) == pytest.approx(more_rows + pooler)


def test_flops_relative_to_the_simple_model():
    """A frozen decoder has no weight gradient and the last layer's output side runs on masked rows: cheaper than (i + 2) / (3 k)."""
    config = mslt(BASE)
    whole = flops_per_token(config, config.stages[-1])
    for stage, simple in zip(config.stages[:4], [0.281, 0.361, 0.441, 0.521], strict=True):
        assert simple - 0.08 < flops_per_token(config, stage) / whole < simple


# --- the table ---


def test_table_of_a_run():
    lines = cost_table(mslt(BASE)).splitlines()
    assert len(lines) == 1 + 5 + 2
    assert lines[0].split() == [
        "stage",
        "name",
        "steps",
        "depth",
        "train",
        "from",
        "trainable",
        "layers",
        "FLOPs",
        "share",
    ]
    assert lines[2].split()[:9] == ["1", "layers", "3-5", "210", "6", "3", "22,478,396", "0.361", "0.307"]
    assert (
        "2.01x by layers (b = 2, head = 0.516 layer forwards)" in lines[-2]
    )  # the joint share of 16% gives 2.01 with the head
    assert lines[-1].startswith("total: 1000 steps, 2,048,000 tokens, ")
    assert sum(float(line.split()[-1].rstrip("%")) for line in lines[1:6]) == pytest.approx(100, abs=0.3)


def test_table_of_the_baseline():
    lines = cost_table(BASE).splitlines()
    assert lines[1].split() == ["0", "all", "layers", "1000", "12", "0", "110,106,428", "1.000", "1.000", "100.0%"]
    assert "1.00x by layers" in lines[2] and "1.00x by FLOPs" in lines[2]


def test_table_with_measured_times():
    lines = cost_table(mslt(BASE), [0.1, 0.2, 0.3, 0.4, 0.8]).splitlines()
    assert [line.split()[-2:] for line in lines[1:6]] == [
        ["100.0", "0.125"],
        ["200.0", "0.250"],
        ["300.0", "0.375"],
        ["400.0", "0.500"],
        ["800.0", "1.000"],
    ]
    lines = cost_table(mslt(BASE, MsltOptions(joint=0.0)), [0.1, 0.2, 0.3, 0.4]).splitlines()
    assert lines[1].split()[-1] == "-"  # no stage trains everything: there is nothing to divide by
    with pytest.raises(ConfigError, match="seconds_per_step must have 5 numbers, one a stage, got 1"):
        cost_table(mslt(BASE), [0.1])
