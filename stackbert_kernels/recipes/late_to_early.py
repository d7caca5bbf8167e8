"""Late-to-early training: for its first part, a run pulls an early layer towards the last one of a finished, smaller model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import Alignment, ConfigError, Stage, TrainConfig

EARLY = 8
"""The layer is the one at an eighth of the depth."""


@dataclass(frozen=True)
class LateToEarlyOptions:
    """The weight is the paper's; which layer, and for how long, is not known from it."""

    early: int = 0
    """The layer that is pulled, counted from 1; 0 = the one at an eighth of the depth (3 of 24, 2 of 12, at least 1)."""
    weight: float = 0.1
    """Of the pull in the loss at first; it falls to 0 in a straight line. 0 = no pull: what the run would be without a teacher."""
    stop: float = 0.3
    """Share of the steps after which the pull is 0 and the teacher gone."""

    def __post_init__(self):
        if self.early < 0:
            raise ConfigError(f"late_to_early: early must be >= 0, got {self.early}")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"late_to_early: weight must be >= 0 and finite, got {self.weight}")
        if not 0 < self.stop <= 1:
            raise ConfigError(f"late_to_early: stop must be in (0, 1], got {self.stop}")


def late_to_early(base: TrainConfig, options: LateToEarlyOptions = LateToEarlyOptions()) -> TrainConfig:
    """Zhao et al. 2026, "Late-to-Early Training: LET LLMs Learn Earlier, So Faster and Better" (ICLR, arXiv 2602.05393).

    base.teacher, a finished run or any BERT of transformers with the same words, reads the same masked tokens as the model, without dropout
    and without learning. The loss gets minus the mean cosine, over all tokens, between the output of an early layer and the teacher's last
    one. The paper trains language models that read left to right; the loss, the straight fall of the weight and 0.1 (of .01 to 3 the best)
    are as known of it. Not known are the layer, when the teacher stops (between a quarter and half of the steps is our range) and on which
    side vectors of different widths are mapped: here a matrix without a bias maps the model's to the teacher's width, learns with the rest
    and is dropped with the teacher. Other tokenizers, which the paper allows, are refused. The speed-up that it reports (1.6x) is in steps;
    the teacher's forward pass, and what its training cost, are not in it.
    """
    layers = base.model.layers
    layer = options.early or max(1, round(layers / EARLY))
    if layer > layers:
        raise ConfigError(f"late_to_early: early must be one of {layers}, got {layer}")
    steps = round(options.stop * base.steps)
    if steps < 1 or (base.steps == steps and options.stop < 1):
        raise ConfigError(
            f"late_to_early: steps must leave each part (stop {options.stop}) at least 1, got steps {base.steps}"
        )
    align = Alignment(layer, options.weight, steps)
    stages = [Stage(steps=steps, depth=layers, align=align, name="aligned")]
    if base.steps > steps:
        stages.append(Stage(steps=base.steps - steps, depth=layers, name="all layers"))
    return replace(base, stages=tuple(stages), recipe="late_to_early")
