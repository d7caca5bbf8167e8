"""Ordinary training: all layers from the first step to the last."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import Stage, TrainConfig


@dataclass(frozen=True)
class BaselineOptions:
    """Ordinary training has nothing to choose."""


def baseline(base: TrainConfig, options: BaselineOptions = BaselineOptions()) -> TrainConfig:
    """Devlin et al. 2018, "BERT" (arXiv 1810.04805): one stage, all layers, all parameters."""
    return replace(base, stages=(whole_run(base),), recipe="baseline")


def whole_run(base: TrainConfig) -> Stage:
    return Stage(steps=base.steps, depth=base.model.layers, name="all layers")
