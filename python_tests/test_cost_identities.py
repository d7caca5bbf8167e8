"""specs/incremental_training.md: the cost identities of arXiv 2411.18700, by summing the plan's cost of every step."""

from __future__ import annotations

from fractions import Fraction

import pytest

from stackbert_kernels.config import ModelConfig, Stage, TrainConfig
from stackbert_kernels.plan import plan, step_cost

STEPS = 480  # divisible by 2 S for each S below


def incremental(parts: int, layers: int) -> TrainConfig:
    """S stages of two equal phases: the new layers alone, then all that are there."""
    stages = []
    for s in range(1, parts + 1):
        depth, below = s * layers // parts, (s - 1) * layers // parts
        steps = STEPS // (2 * parts)
        stages += [
            Stage(
                steps=steps,
                depth=depth,
                train_from=below,
                **({"grow": "random", "embeddings": "freeze"} if below else {}),
            ),
            Stage(steps=steps, depth=depth),
        ]
    return TrainConfig(model=ModelConfig(layers=layers), steps=STEPS, stages=tuple(stages))


def total(config: TrainConfig, b: float) -> float:
    """Layer forwards of all steps, one by one."""
    cost = 0.0
    for span in plan(config):
        for _ in range(span.first, span.last):
            cost += step_cost(span.stage.depth, span.stage.train_from, backward=b)
    return cost


CASES = [(4, 12, 53.1, 50.0, 0.46875), (8, 24, 45.3, 41.7, 0.546875), (12, 12, 42.7, 38.9, 0.572917)]
"""S, layers, C_inc / C_base in percent with b = 1 and with b = 2, T_cont / T. Twelve layers do not split into 8: the ratio has no L."""


@pytest.mark.parametrize(("parts", "layers", "one", "two", "continual"), CASES)
def test_the_table_of_the_paper(parts, layers, one, two, continual):
    ratios = [
        total(incremental(parts, layers), b) / total(TrainConfig(model=ModelConfig(layers=layers), steps=STEPS), b)
        for b in (1.0, 2.0)
    ]
    assert [round(100 * r, 1) for r in ratios] == [one, two]
    # Closed forms: c L T (3S + 5) / (4S) with b = 1, a base of 2 c L T; (S + 2) / (3S) of the base with b = 2.
    assert ratios[0] == pytest.approx(float(Fraction(3 * parts + 5, 8 * parts)))
    assert ratios[1] == pytest.approx(float(Fraction(parts + 2, 3 * parts)))
    # Continual training of the whole model until the baseline's budget is spent, in steps of it.
    left = total(TrainConfig(model=ModelConfig(layers=layers), steps=STEPS), 1.0) - total(
        incremental(parts, layers), 1.0
    )
    share = left / step_cost(layers, 0, backward=1.0) / STEPS
    assert share == pytest.approx(5 / 8 * (1 - 1 / parts)) and round(share, 6) == round(continual, 6)


def test_one_stage_costs_what_plain_training_does():
    layers = 12
    assert total(incremental(1, layers), 1.0) == 2 * STEPS * layers == total(TrainConfig(steps=STEPS), 1.0)


@pytest.mark.parametrize(("k", "layers"), [(1, 12), (2, 12), (3, 12), (4, 12), (6, 12), (8, 24)])
def test_windows_without_the_second_phase(k, layers):
    """Phase 1 alone is MSLT's window: (i + 2) / (3k) of a full step in stage i with b = 2."""
    spans = plan(incremental(k, layers))[::2]
    whole = step_cost(layers, 0)
    costs = [step_cost(span.stage.depth, span.stage.train_from) / whole for span in spans]
    assert costs == pytest.approx([(i + 2) / (3 * k) for i in range(1, k + 1)])
