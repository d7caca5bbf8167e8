"""The schedule that paid most where we measured it (docs/recipes.md): two shallow stages that are long enough to learn context in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import ConfigError, Stage, TrainConfig
from stackbert_kernels.recipes.steps import divide

STAGES = 3


@dataclass(frozen=True)
class AutoOptions:
    """The default was found on one text, with one size of model."""

    shares: tuple[float, ...] = (0.34, 0.24, 0.42)
    """Of all steps, in proportion: a quarter of the layers, half of them, all."""

    def __post_init__(self):
        if len(self.shares) != STAGES or not all(0 < share < float("inf") for share in self.shares):
            raise ConfigError(f"auto: shares must be {STAGES} numbers > 0, one a stage, got {self.shares}")


def auto(base: TrainConfig, options: AutoOptions = AutoOptions()) -> TrainConfig:
    """Stacking (recipes/stacking.py) that keeps the optimizer's state, copied with the layers, and grows later than published.

    No paper's method. A shallow encoder learns to use context after no more steps than a deep one, each at a fraction of the price; grown
    with its moments, it loses little of what it has learned. The rate decays over the run as if nothing grew.

    Depths are a quarter and half of the layers, or those that come nearest and of which each divides the next: 12 layers 3 -> 6 -> 12, 9
    1 -> 3 -> 9. Where only one layer fits below (7: 1 -> 7), it has the steps of both shallow stages.
    """
    depths = _depths(base.model.layers)
    shares = options.shares if len(depths) == STAGES else (sum(options.shares[:-1]), options.shares[-1])
    steps = divide(base.steps, shares)
    if min(steps) < 1:
        raise ConfigError(f"auto: steps must leave each of {len(depths)} stages at least 1, got steps {base.steps}")
    stages = [
        Stage(steps=of_stage, depth=depth, grow="stack" if i else None, optimizer_state="copy", name=f"{depth} layers")
        for i, (depth, of_stage) in enumerate(zip(depths, steps, strict=True))
    ]
    return replace(base, stages=tuple(stages), recipe="auto")


def _depths(layers: int) -> list[int]:
    """[3, 6, 12] for 12 layers, [1, 7] for 7."""
    if layers < 2:
        raise ConfigError(f"auto: layers must be at least 2, got {layers}")
    half = _divisor(layers, near=layers / 2)
    return [_divisor(half, near=layers / 4), half, layers] if half > 1 else [half, layers]


def _divisor(number: int, *, near: float) -> int:
    """That divisor of `number` below it which is nearest to `near`, of two the larger."""
    divisors = (divisor for divisor in range(1, number) if number % divisor == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - near), -divisor))
