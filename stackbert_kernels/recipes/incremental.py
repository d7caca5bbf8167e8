"""Incremental training: each stage adds layers, trains them alone, then all of them; training of the whole model follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import OPTIMIZER_STATES, ConfigError, Stage, TrainConfig
from stackbert_kernels.recipes.steps import divide, rewarm

INITS = ("random", "identity", "copy_top")
POLICIES = ("freeze", "output_grad", "untie", "full")
LR_POLICIES = ("global", "restart")


@dataclass(frozen=True)
class IncrementalOptions:
    """What this package knows of the paper is its protocol; how new layers begin, rates and the optimizer's state are not verified."""

    stages: int = 4
    """Each adds layers / stages layers; where that is no whole number, as near to it as can be."""
    continual: float | None = None
    """Share of all steps in which the whole model trains at the end; default: as many as bring the cost up to that of ordinary training
    for as many steps as the stages take, where forward and backward cost the same: 5/8 (1 - 1/stages) of theirs."""
    init: str = "random"
    """New layers: random, identity (random with zero output matrices) or copy_top (of the topmost old ones)."""
    embeddings: str = "freeze"
    """Embeddings while new layers train alone: freeze, output_grad (the tied word embedding learns from the decoder alone), untie (the
    decoder learns on a private copy meanwhile), or full (gradient through the frozen layers, no saving)."""
    lr_policy: str = "global"
    """global: one warm-up and decay over the run; restart: each phase has its own."""
    rewarm: int | None = 0
    """Steps over which the rate rises again in each phase; none: a tenth of the phase's steps, at most 1000."""
    optimizer_state: str = "copy"
    """Adam moments at a growth: copy (those of copied layers; fresh layers have none), zero (new layers start without), reset (all)."""

    def __post_init__(self):
        if self.stages < 1:
            raise ConfigError(f"incremental: stages must be >= 1, got {self.stages}")
        if self.continual is not None and not 0 <= self.continual < 1:
            raise ConfigError(f"incremental: continual must be in [0, 1), got {self.continual}")
        if self.rewarm is not None and self.rewarm < 0:
            raise ConfigError(f"incremental: rewarm must be >= 0, got {self.rewarm}")
        for name, choices in (("init", INITS), ("embeddings", POLICIES), ("lr_policy", LR_POLICIES), ("optimizer_state", OPTIMIZER_STATES)):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"incremental: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )


def incremental(base: TrainConfig, options: IncrementalOptions = IncrementalOptions()) -> TrainConfig:
    """Li et al. 2024, "On the Effectiveness of Incremental Training of Large Language Models" (arXiv 2411.18700): its protocol, on BERT.

    Stage s of S puts layers / S new layers on top; they train alone for 1/(2S) of the stages' steps (phase 1), then all present layers do
    for as many (phase 2). The paper's finding, on GPT-2, is negative: the saving is gone once the loss of ordinary training is to be
    reached. With equal costs of forward and backward the stages cost (3S + 5) / (8S) of ordinary training for as many steps.
    """
    layers, S = base.model.layers, options.stages
    if layers < S:
        raise ConfigError(f"incremental: layers must be at least stages, got layers {layers}, stages {S}")
    continual = _equal_compute(S) if options.continual is None else options.continual
    continual_steps = round(continual * base.steps)
    phases = divide(base.steps - continual_steps, (1.0,) * (2 * S))
    if min(phases) < 1 or (continual > 0 and continual_steps < 1):
        raise ConfigError(
            f"incremental: steps must leave each of {2 * S} phases and continual training (share {continual:.3g}) at least 1, "
            f"got steps {base.steps}"
        )

    def phase(name: str, steps: int, **window) -> Stage:
        again = rewarm(steps, options.rewarm) if stages else 0
        return Stage(steps=steps, name=name, lr_policy=options.lr_policy, optimizer_state=options.optimizer_state,
                     rewarm=again, **window)  # fmt: skip

    stages: list[Stage] = []
    old = 0
    for s in range(S):
        depth = round((s + 1) * layers / S)
        alone = {"grow": options.init, "train_from": old, "embeddings": options.embeddings} if s else {}
        stages.append(phase(f"layers {old}-{depth - 1}", phases[2 * s], depth=depth, **alone))
        stages.append(phase(f"all {depth}", phases[2 * s + 1], depth=depth))
        old = depth
    if continual_steps:
        stages.append(phase("continual", continual_steps, depth=layers))
    return replace(base, stages=tuple(stages), recipe="incremental")


def _equal_compute(S: int) -> float:
    """T_cont / (T + T_cont) where T_cont = 5/8 (1 - 1/S) T brings the cost of the stages, T steps, up to that of T ordinary steps (b = 1)."""
    after = 5 / 8 * (1 - 1 / S)
    return after / (1 + after)
