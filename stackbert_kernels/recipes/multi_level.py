"""The multi-level framework: coalesce a briefly trained model into a smaller one, train that, and come back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import LAYER_GROUPS, ConfigError, Stage, TrainConfig, check_coalescing, stage_model
from stackbert_kernels.recipes.steps import divide

OPTIMIZER_STATES = ("reset", "copy")
LR_POLICIES = ("global", "restart", "published")
SMALLEST_RATE = 4.0
"""Of the published example: the small model begins at so many times the large one's rate."""


@dataclass(frozen=True)
class MultiLevelOptions:
    """The defaults are those of the authors' GPT-2 example where it says something, but for the rate and the grouping of layers."""

    levels: int = 2
    """Models of the cycle, each `factor` times smaller than the one before in layers, heads, hidden and inner size."""
    factor: int = 2
    """How many layers, heads, ... become one."""
    layer_groups: str = "adjacent"
    """Which layers become one: adjacent (the framework's default) or apart (i with i + half, as heads; the authors' example)."""
    alpha: float = 0.5
    """On the way back: share of the de-coalesced weights, the rest is the larger model's own from before (0.25 for some models)."""
    stage_weights: tuple[float, ...] = ()
    """Steps of the stages in proportion to these, down and up again; empty = 5 for each on the way down, 50 for the smallest and the
    last, 25 for others on the way up (of two levels, 5 : 50 : 50 as published)."""
    optimizer_state: str = "reset"
    """Adam moments at a change of level: reset (a new run each, as published) or copy (by the maps of the weights)."""
    lr_policy: str = "global"
    """global: one warm-up and decay over the run; restart: each stage has its own; published: the first stage warms up, every later one
    falls linearly to zero from the run's rate, the smallest model's from four times that."""

    def __post_init__(self):
        if self.levels < 2:
            raise ConfigError(f"multi_level: levels must be >= 2, got {self.levels}")
        if self.factor < 2:
            raise ConfigError(f"multi_level: factor must be >= 2, got {self.factor}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"multi_level: alpha must be in [0, 1], got {self.alpha}")
        choices = (("layer_groups", LAYER_GROUPS), ("optimizer_state", OPTIMIZER_STATES), ("lr_policy", LR_POLICIES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"multi_level: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        stages = 2 * self.levels - 1
        if self.stage_weights and len(self.stage_weights) != stages:
            raise ConfigError(
                f"multi_level: stage_weights must have {stages} numbers, one a stage, got {len(self.stage_weights)}"
            )
        if not all(0 < weight < float("inf") for weight in self.stage_weights):
            raise ConfigError(f"multi_level: stage_weights must be > 0, got {self.stage_weights}")


def multi_level(base: TrainConfig, options: MultiLevelOptions = MultiLevelOptions()) -> TrainConfig:
    """Zou et al. 2024, "A Multi-Level Framework for Accelerating Training Transformer Models" (ICLR, arXiv 2404.07999): a V-cycle.

    The model is trained briefly, coalesced (growth/multi_level.py), and so on down to the smallest, which is trained longest; then each
    larger one comes back, interpolated with its weights from before, and trains on. Operators, alpha and the steps of two levels are those of
    the authors' code; steps of more levels, and that the published rates fall linearly, are not from there. All levels read the same text at
    the same batch size.
    """
    if base.model.embedding:
        raise ConfigError(
            f"multi_level: factorised embeddings have no smaller level, got embedding {base.model.embedding}"
        )
    shapes = [Stage(steps=1, depth=base.model.layers)]  # from the largest to the smallest
    for level in range(1, options.levels):
        larger, divisor = stage_model(base.model, shapes[-1]), options.factor**level
        for name in ("layers", "heads", "inner"):
            if getattr(base.model, name) % divisor:
                raise ConfigError(
                    f"multi_level: {name} must be divisible by factor for each smaller level ({divisor}), got {getattr(base.model, name)}"
                )
        sizes = {name: getattr(base.model, name) // divisor for name in ("hidden", "heads", "inner")}
        shapes.append(Stage(steps=1, depth=base.model.layers // divisor, **sizes))
        check_coalescing(larger, stage_model(base.model, shapes[-1]), where="multi_level: ")

    cycle = [*range(options.levels), *reversed(range(options.levels - 1))]
    steps = divide(base.steps, options.stage_weights or _weights(options.levels))
    if min(steps) < 1:
        raise ConfigError(
            f"multi_level: steps must leave each of {len(cycle)} stages at least 1, got steps {base.steps}"
        )
    stages = []
    for i, (level, of_stage) in enumerate(zip(cycle, steps, strict=True)):
        grow = None if i == 0 else "coalesce" if i < options.levels else "decoalesce"
        width = shapes[level].hidden or base.model.hidden
        stages.append(replace(
            shapes[level], steps=of_stage, grow=grow, optimizer_state=options.optimizer_state, layer_groups=options.layer_groups,
            alpha=options.alpha, name=f"{shapes[level].depth} x {width}", **_rate(options, i, of_stage),
        ))  # fmt: skip
    return replace(base, stages=tuple(stages), recipe="multi_level")


def _weights(levels: int) -> tuple[float, ...]:
    return (*(5.0,) * (levels - 1), 50.0, *(25.0,) * (levels - 2), 50.0)


def _rate(options: MultiLevelOptions, stage: int, steps: int) -> dict:
    if options.lr_policy != "published":
        return {"lr_policy": options.lr_policy}
    first, last = (1 / steps, 1.0) if stage == 0 else (SMALLEST_RATE if stage == options.levels - 1 else 1.0, 0.0)
    return {"lr_policy": "curve", "lr_curve": ((0, first), (steps, last))}
