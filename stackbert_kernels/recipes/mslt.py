"""Multi-stage layerwise training: grow the encoder at its top, train only the new layers, finish with all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import (
    OPTIMIZER_STATES,
    RETIES,
    ConfigError,
    Stage,
    TrainConfig,
)
from stackbert_kernels.recipes.baseline import whole_run
from stackbert_kernels.recipes.steps import divide, rewarm

INITS = ("copy_top", "random", "identity")
POLICIES = ("freeze", "output_grad", "untie", "full")
LR_POLICIES = ("global", "restart")


@dataclass(frozen=True)
class MsltOptions:
    """What the paper's abstract leaves open; the defaults are those of this package, not verified against the paper's body."""

    stages: int = 4
    """Growth stages before the joint one; each adds layers / stages layers."""
    joint: float = 0.16
    """Share of all steps in which all layers train together at the end."""
    init: str = "copy_top"
    """New layers: copy_top (of the layers trained last), random, or identity (random with zero output matrices; keeps the function
    of a pre-norm encoder, and nearly that of a post-norm one)."""
    embeddings: str = "freeze"
    """Embeddings from the second growth stage on: freeze, output_grad (the tied word embedding learns from the decoder alone, which
    changes the input of the frozen layers: the log has by how much, `word_drift`), untie (the decoder learns on a private copy until
    the joint stage), or full (gradient through the frozen layers: no saving, for comparison only)."""
    retie: str = "decoder"
    """With embeddings untie, what the word embedding becomes in the joint stage: the decoder's copy, or the mean of the two."""
    lr_policy: str = "global"
    """global: one warm-up and decay over the run; restart: each stage has its own."""
    rewarm: int | None = None
    """Steps over which the rate rises again when the window moves, the joint stage included; default: a tenth of the stage's steps,
    at most 1000."""
    optimizer_state: str = "copy"
    """Adam moments at a change of stage: copy (those of the copied layers), zero (new layers start without), reset (all)."""
    frozen_dropout: bool = True
    """Whether the frozen layers keep dropout, so that new layers see the inputs they will see in joint training."""
    stage_weights: tuple[float, ...] = ()
    """Steps of the growth stages in proportion to these; empty = equal."""

    def __post_init__(self):
        if self.stages < 1:
            raise ConfigError(f"mslt: stages must be >= 1, got {self.stages}")
        if not 0 <= self.joint < 1:
            raise ConfigError(f"mslt: joint must be in [0, 1), got {self.joint}")
        for name, choices in (
            ("init", INITS),
            ("embeddings", POLICIES),
            ("lr_policy", LR_POLICIES),
            ("optimizer_state", OPTIMIZER_STATES),
            ("retie", RETIES),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"mslt: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.retie != "decoder" and self.embeddings != "untie":
            raise ConfigError(f"mslt: retie needs embeddings untie, got embeddings {self.embeddings!r}")
        if self.rewarm is not None and self.rewarm < 0:
            raise ConfigError(f"mslt: rewarm must be >= 0, got {self.rewarm}")
        if self.stage_weights and len(self.stage_weights) != self.stages:
            raise ConfigError(
                f"mslt: stage_weights must have {self.stages} numbers, one a stage, got {len(self.stage_weights)}"
            )
        if not all(0 < weight < float("inf") for weight in self.stage_weights):
            raise ConfigError(f"mslt: stage_weights must be > 0, got {self.stage_weights}")


def mslt(base: TrainConfig, options: MsltOptions = MsltOptions()) -> TrainConfig:
    """Yang et al. 2020, "Progressively Stacking 2.0" (arXiv 2011.13635): `stages` growth stages, then joint training.

    Stage i of k runs i * m layers (m = layers / k) and trains the top m of them with the heads; stage 1 trains the embeddings too.
    From the paper's abstract: stages, growth at the output side, only new layers train, more than 110% speed-up. All else is
    `MsltOptions`. With one stage and joint = 0 this is `baseline`.
    """
    layers, k = base.model.layers, options.stages
    if layers % k:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise ConfigError(
            f"mslt: layers must be divisible by stages, got layers {layers}, stages {k}; stages that fit: {fitting}"
        )
    joint_steps = round(options.joint * base.steps)
    weights = options.stage_weights or (1.0,) * k
    growth_steps = divide(base.steps - joint_steps, weights)
    if min(growth_steps) < 1 or (options.joint > 0 and joint_steps < 1):
        raise ConfigError(
            f"mslt: steps must leave each of {k} stages and the joint one (share {options.joint}) at least 1, got steps {base.steps}"
        )
    if k == 1 and joint_steps == 0:
        return replace(base, stages=(whole_run(base),), recipe="mslt")

    m = layers // k
    stages = []
    for i, steps in enumerate(growth_steps):
        moved = (
            {}
            if i == 0
            else {"grow": options.init, "embeddings": options.embeddings, "rewarm": rewarm(steps, options.rewarm)}
        )
        stages.append(
            _stage(options, f"layers {i * m}-{(i + 1) * m - 1}", steps, depth=(i + 1) * m, train_from=i * m, **moved)
        )
    if joint_steps:
        stages.append(
            _stage(
                options,
                "joint",
                joint_steps,
                depth=layers,
                train_from=0,
                retie=options.retie,
                rewarm=rewarm(joint_steps, options.rewarm),
            )
        )
    return replace(base, stages=tuple(stages), recipe="mslt")


def _stage(options: MsltOptions, name: str, steps: int, **window) -> Stage:
    return Stage(steps=steps, name=name, lr_policy=options.lr_policy, optimizer_state=options.optimizer_state,
                 frozen_dropout=options.frozen_dropout, **window)  # fmt: skip
