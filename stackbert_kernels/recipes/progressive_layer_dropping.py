"""Progressive layer dropping: steps leave out layers at random, more of them later and nearer to the top."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import ConfigError, LayerDrop, Stage, TrainConfig

SMALLEST_KEEP = 0.001
"""What a layer adds is multiplied by 1 / keep in a step that keeps it."""
DECAYS = 100.0
"""gamma times the run's steps, as the paper has it (from memory)."""


@dataclass(frozen=True)
class ProgressiveLayerDroppingOptions:
    """The defaults are the published ones."""

    keep: float = 0.5
    """What theta falls to, the share of steps in which the last layer then still runs; 1 = nothing is left out."""
    gamma: float = 0.0
    """How fast theta falls with the steps; 0 = 100 / steps."""
    deepspeed_compat: bool = False
    """Draw and scale as DeepSpeed's code does, where the two are one layer apart (the first layer, never left out, is scaled up)."""
    scaled_init: bool = True
    """Whether the matrices that end a residual branch begin smaller, by 1 / sqrt(2 layers)."""

    def __post_init__(self):
        if not SMALLEST_KEEP <= self.keep <= 1:
            raise ConfigError(f"progressive_layer_dropping: keep must be in [{SMALLEST_KEEP}, 1], got {self.keep}")
        if not 0 <= self.gamma < float("inf"):
            raise ConfigError(f"progressive_layer_dropping: gamma must be >= 0 and finite, got {self.gamma}")


def progressive_layer_dropping(
    base: TrainConfig, options: ProgressiveLayerDroppingOptions = ProgressiveLayerDroppingOptions()
) -> TrainConfig:
    """Zhang and He 2020, "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping" (arXiv 2010.13369).

    The encoder becomes pre-norm (norm = pre), whatever the base says: that is the paper's block. A layer that is left out costs nothing,
    forward or backward; its parameters see a zero gradient. Evaluation uses all layers, unscaled. About a quarter of the FLOPs are saved a step; the rest of
    the paper's 2.5x comes from the higher rate that pre-norm bears (1e-3 at 4,096 sequences), which is the base's to choose.
    """
    drop = LayerDrop(
        options.keep, 0.0 if options.keep == 1 else options.gamma or DECAYS / base.steps, options.deepspeed_compat
    )
    stage = Stage(steps=base.steps, depth=base.model.layers, drop=drop, name=f"keep {options.keep:g}")
    model = replace(base.model, norm="pre", scaled_init=options.scaled_init)
    return replace(base, model=model, stages=(stage,), recipe="progressive_layer_dropping")
