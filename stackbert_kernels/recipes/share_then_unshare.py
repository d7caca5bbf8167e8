"""Sharing weights, then unsharing: all layers begin equal and are one layer for the first part of the run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import (
    OPTIMIZER_STATES,
    SHARED_GRADIENTS,
    UNSHARE,
    ConfigError,
    Stage,
    TrainConfig,
    Untying,
)

UNTIL = ("fixed", "adaptive", "split")
READINGS = 500


@dataclass(frozen=True)
class ShareThenUnshareOptions:
    """The defaults are the paper's fixed variant (SWE-F), but for what says otherwise."""

    until: str = "fixed"
    """When layers get weights of their own: fixed (after the share `shared` of the steps: SWE-F), adaptive (all of them once more than half
    of the cosines between gradients of adjacent layers were below `below` in three readings in a row: SWE-A), or split (a group of
    layers is split between two whose gradients' cosine is below, at each reading: SWE-M)."""
    shared: float = 0.1
    """With until fixed: share of all steps before the layers get weights of their own (as published: 50k of 500k); 0 = equal initial
    weights only."""
    every: int = 0
    """Steps between two readings; 0 = as often in the run as published, 500 times."""
    below: float = 0.5
    """A cosine below this is low."""
    unit: int = 1
    """Layers of the unit that is repeated: layer i reads row i modulo unit."""
    gradient: str = "mean"
    """What a shared row learns from: the mean over the layers that read it (as published), or the sum."""
    optimizer_state: str = "copy"
    """Adam moments where sharing ends: copy (each layer goes on with those of the row it read), zero (new rows start without), reset
    (all). Not said by the paper."""
    rewarm: int = 0
    """Steps over which the rate rises again once sharing ends."""

    def __post_init__(self):
        if not 0 <= self.shared < 1:
            raise ConfigError(f"share_then_unshare: shared must be in [0, 1), got {self.shared}")
        if not -1 <= self.below <= 1:
            raise ConfigError(f"share_then_unshare: below must be in [-1, 1], got {self.below}")
        for name, least in (("unit", 1), ("rewarm", 0), ("every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"share_then_unshare: {name} must be >= {least}, got {getattr(self, name)}")
        for name, choices in (
            ("until", UNTIL),
            ("gradient", SHARED_GRADIENTS),
            ("optimizer_state", OPTIMIZER_STATES),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"share_then_unshare: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )


def share_then_unshare(base: TrainConfig, options: ShareThenUnshareOptions = ShareThenUnshareOptions()) -> TrainConfig:
    """Yang et al. 2021, "Speeding up Deep Model Training by Sharing Weights and Then Unsharing" (arXiv 2110.03848), known here by the
    text of its earlier submission: layers share one set of weights (or of `unit` layers), then each goes on with a copy.

    A step costs what it costs without sharing: the paper's saving is that fewer steps do. A reading of the gradients costs one more step.
    The paper's correlation is not spelled out; here it is the cosine. Theirs is a pre-norm BERT-large at 3e-4.
    """
    layers, unit = base.model.layers, options.unit
    stray = ("every", "below") if options.until == "fixed" else ("shared",)
    for name in stray:
        if getattr(options, name) != getattr(ShareThenUnshareOptions, name):
            raise ConfigError(f"share_then_unshare: until {options.until} does not read {name}, got {getattr(options, name)}")  # fmt: skip
    fitting = [n for n in range(1, layers) if layers % n == 0]
    if unit not in fitting:
        raise ConfigError(
            f"share_then_unshare: unit must divide layers and be fewer, got layers {layers}, unit {unit}; "
            f"units that fit: {', '.join(map(str, fitting)) or 'none'}"
        )
    shared = Stage(steps=base.steps, depth=layers, rows=tuple(i % unit for i in range(layers)), shared_gradient=options.gradient,
                   name="shared weights")  # fmt: skip
    if options.until != "fixed":
        if options.rewarm:
            raise ConfigError(
                f"share_then_unshare: rewarm needs a known step: until must be fixed, got {options.until}"
            )
        if options.until == "split" and unit > 1:
            raise ConfigError(f"share_then_unshare: until split begins with one group, which needs unit 1, got {unit}")
        every = options.every or max(1, base.steps // READINGS)
        untie = Untying(every, options.below, split=options.until == "split")
        watched = replace(
            shared, untie=untie, optimizer_state=options.optimizer_state, name=f"shared until {options.until}"
        )
        return replace(base, stages=(watched,), recipe="share_then_unshare")
    together = round(options.shared * base.steps)
    if options.shared > 0 and not 0 < together < base.steps:
        raise ConfigError(
            f"share_then_unshare: steps must leave both stages (shared {options.shared:g}) at least 1, got steps {base.steps}"
        )
    if options.shared == 0:
        if unit > 1:
            raise ConfigError(f"share_then_unshare: shared 0 begins with equal layers, which needs unit 1, got {unit}")
        whole = Stage(steps=base.steps, depth=layers, name="own weights")
        return replace(base, model=replace(base.model, equal_init=True), stages=(whole,), recipe="share_then_unshare")
    alone = base.steps - together
    stages = (
        replace(shared, steps=together),
        Stage(steps=alone, depth=layers, grow=UNSHARE, optimizer_state=options.optimizer_state,
              rewarm=min(options.rewarm, alone), name="own weights"),
    )  # fmt: skip
    return replace(base, stages=stages, recipe="share_then_unshare")
