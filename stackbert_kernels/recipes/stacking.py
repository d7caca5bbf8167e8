"""Stacking: train a shallow encoder, copy its layers on top of themselves, go on with all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import OPTIMIZER_STATES, ConfigError, Stage, TrainConfig
from stackbert_kernels.recipes.steps import divide

INITS = ("stack", "interleave", "identity", "random")
LR_POLICIES = ("global", "restart", "published")
PUBLISHED_STEPS = (50_000, 70_000, 280_000)
PUBLISHED_RATES = (
    ((0, 1e-7 / 8e-4), (10_000, 1.0), (50_000, 5.5 / 8)),
    ((0, 5.5 / 8), (70_000, 3 / 8)),
    ((0, 3 / 8), (800_000, 0.0)),
)
"""Of each stage: (update, share of 8e-4), as the authors' script has them."""


@dataclass(frozen=True)
class StackingOptions:
    """The defaults are those of the authors' script where it says something, but for the end of the rate: here it decays to zero."""

    start: int = 0
    """Layers of the first stage; 0 = layers / factor^2 where that is whole, else layers / factor."""
    factor: int = 2
    """Each growth makes so many times as many layers (2 as published; 4: from 3 to 12 at once)."""
    init: str = "stack"
    """New layers: stack (copies of all layers, in their order), interleave (each copy beside its source), identity (random with zero
    output matrices, the authors' ablation: keeps the function of a pre-norm encoder), or random."""
    stage_weights: tuple[float, ...] = ()
    """Steps of the stages in proportion to these; empty = 5 : 7 : 28, the published share (two stages: 12 : 28)."""
    optimizer_state: str = "reset"
    """Adam moments at a growth: reset (as published), copy (by the growth map), zero (new layers start without)."""
    lr_policy: str = "global"
    """global: one warm-up and decay to zero over the run; restart: each stage has its own; published: the script's curve over three
    stages, continuous, whose last stage ends in the middle of its decay, at 0.24 of the highest rate."""

    def __post_init__(self):
        if self.start < 0:
            raise ConfigError(f"stacking: start must be >= 0, got {self.start}")
        if self.factor < 2:
            raise ConfigError(f"stacking: factor must be >= 2, got {self.factor}")
        for name, choices in (("init", INITS), ("optimizer_state", OPTIMIZER_STATES), ("lr_policy", LR_POLICIES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"stacking: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not all(0 < weight < float("inf") for weight in self.stage_weights):
            raise ConfigError(f"stacking: stage_weights must be > 0, got {self.stage_weights}")


def stacking(base: TrainConfig, options: StackingOptions = StackingOptions()) -> TrainConfig:
    """Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking" (ICML, PMLR 97): 3 -> 6 -> 12 layers, all of which
    learn in every stage.

    Operator, steps, rates and the optimizer's reset are those of the authors' script. The rest of it is not this recipe's to set:
    `--steps 400000 --lr 8e-4 --clip 0 --norm pre --batch-tokens 122880 --stacking.lr-policy published` comes nearest (theirs: 102,400
    to 122,880 tokens a step, layer norms without weight and bias, sinusoidal positions). Whether the paper's 400K counts all three stages,
    as here, or the last alone is not verified.
    """
    depths = _depths(base.model.layers, options)
    weights = options.stage_weights or _published_weights(len(depths))
    if len(weights) != len(depths):
        raise ConfigError(
            f"stacking: stage_weights must have {len(depths)} numbers, one a stage ({_arrow(depths)} layers), got {len(weights)}"
        )
    if options.lr_policy == "published" and len(depths) != 3:
        raise ConfigError(
            f"stacking: lr_policy published is of three stages, got {len(depths)} ({_arrow(depths)} layers)"
        )
    steps = divide(base.steps, weights)
    if min(steps) < 1:
        raise ConfigError(f"stacking: steps must leave each of {len(depths)} stages at least 1, got steps {base.steps}")
    stages = []
    for i, (depth, of_stage) in enumerate(zip(depths, steps, strict=True)):
        policy = {"lr_policy": options.lr_policy}
        if options.lr_policy == "published":
            stretch = of_stage / PUBLISHED_STEPS[i]
            policy = {
                "lr_policy": "curve",
                "lr_curve": tuple((at * stretch, share) for at, share in PUBLISHED_RATES[i]),
            }
        stages.append(Stage(steps=of_stage, depth=depth, grow=options.init if i else None,
                            optimizer_state=options.optimizer_state, name=f"{depth} layers", **policy))  # fmt: skip
    return replace(base, stages=tuple(stages), recipe="stacking")


def _depths(layers: int, options: StackingOptions) -> list[int]:
    """[3, 6, 12] for 12 layers."""
    factor, start = options.factor, options.start
    fitting = [layers]
    while fitting[0] % factor == 0:
        fitting.insert(0, fitting[0] // factor)
    wanted = start or fitting[max(0, len(fitting) - 3)]
    if len(fitting) == 1 or wanted not in fitting[:-1]:
        got = f"start {start}" if start else "no start that fits"
        raise ConfigError(
            f"stacking: layers must be start x {factor} x {factor} ..., got layers {layers}, {got}; "
            f"starts that fit: {', '.join(map(str, fitting[:-1])) or 'none'}"
        )
    return fitting[fitting.index(wanted) :]


def _published_weights(stages: int) -> tuple[float, ...]:
    """5 : 7 : 28 of three stages. Of more, earlier ones are shorter by the same factor and all of them keep 30% together."""
    before = [1.4**i for i in range(stages - 1)]
    return (*(0.3 * weight / sum(before) for weight in before), 0.7)


def _arrow(depths: list[int]) -> str:
    return " -> ".join(map(str, depths))
