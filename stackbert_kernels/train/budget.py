"""How many steps fit into a budget of seconds: each stage is timed by a few steps of its own, and the rest is arithmetic.

The recipe lays its stages, its warm-up and its decay over the steps that it is asked for, so its schedule ends with the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from stackbert_kernels.config import ConfigError, TrainConfig
from stackbert_kernels.plan import plan

TIMED_STEPS = 30
FEWEST_STEPS = 20
"""With fewer, a schedule is no schedule."""
LOW_RATE = 1e-6
BOTH_LENGTHS = 4
"""So many times the steps where two lengths are to be timed: the rarer one of the stage is timed by a few at least."""
PROBE_STEPS = 1000
"""The run that is cut short to be timed: long enough for the stages of every recipe."""

Recipe = Callable[[int], TrainConfig]
"""The configuration of a run of so many steps."""


def timing_of(recipe: Recipe, timed: int = TIMED_STEPS) -> TrainConfig:
    """A run that spends `timed` steps in each stage; the `stage_seconds` that training returns for it are what steps take.

    Its rate is so low that it cannot diverge before the warm-up that it has no time for; a rate takes no time. Where the length of samples
    changes inside a stage, that has more steps, and as large a share of each length as in the run.
    """
    shape = recipe(PROBE_STEPS)
    stages, short = [], 0
    for span in plan(shape):
        steps = timed if len(span.lengths) == 1 else BOTH_LENGTHS * timed
        part = (min(shape.short_steps, span.last) - span.first) / span.stage.steps
        short += min(max(round(steps * part), 1), steps - 1) if 0 < part < 1 else steps * (part >= 1)
        align = replace(span.stage.align, until=max(span.stage.align.until, steps))
        stages.append(replace(span.stage, steps=steps, lr_policy="global", lr_curve=(), rewarm=0, align=align))
    steps = sum(stage.steps for stage in stages)
    return replace(
        shape,
        steps=steps,
        stages=tuple(stages),
        data=replace(shape.data, short_share=short / steps) if shape.short_steps else shape.data,
        eval_every=steps,
        checkpoint_every=steps,
        optim=replace(shape.optim, lr=LOW_RATE, warmup=1),
    )


def steps_that_fit(recipe: Recipe, seconds_per_step: Sequence[float], seconds: float) -> int:
    """The most steps whose stages, at their own seconds a step, take no longer than `seconds`."""

    def needed(steps: int) -> float:
        stages = recipe(steps).stages
        return sum(stage.steps * each for stage, each in zip(stages, seconds_per_step, strict=True))

    low, high = 0, int(seconds / min(seconds_per_step)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = needed(middle) <= seconds
        except ConfigError:  # too few for this recipe's stages
            fits = True
        low, high = (middle, high) if fits else (low, middle)
    return low


def enough(steps: int, seconds: float) -> int:
    """`steps`; ConfigError where they are too few to be a run."""
    if steps < FEWEST_STEPS:
        raise ConfigError(f"{seconds:.3g} s have room for {steps} steps, wanted at least {FEWEST_STEPS}")
    return steps
