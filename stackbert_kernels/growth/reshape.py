"""The growths that make a new model and a new optimizer's state, by the name in Stage.grow (config.RESHAPES)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stackbert_kernels.config import REFINE, WIDEN, ModelConfig, OptimConfig, Stage
from stackbert_kernels.growth import multi_level
from stackbert_kernels.growth.feed_forward import widened
from stackbert_kernels.growth.refine import refine
from stackbert_kernels.model.bert import Bert

Kept = multi_level.Kept


def reshape(
    model: Bert,
    moments: Mapping[str, Tensor],
    stage: Stage,
    shape: ModelConfig,
    kept: Kept,
    *,
    seed: int,
    optim: OptimConfig,
) -> tuple[Bert, dict[str, Tensor], dict]:
    """The model of `shape` that stage.grow makes of `model`, the optimizer's state_dict for it, and what the log says of it."""
    if stage.grow == REFINE:
        new, state = refine(model, moments, stage, shape, seed=seed, optim=optim)
        old, now = model.config, new.config
        said = {"from_rank": old.rank, "rank": now.rank, "from_score_dim": old.score_dim, "score_dim": now.score_dim}
        return new, state, said
    if stage.grow == WIDEN:
        return widened(model, moments, stage, shape, seed=seed)
    new, state = multi_level.reshape(model, moments, stage, shape, kept)
    return new, state, {"from_hidden": model.config.hidden, "hidden": new.config.hidden}
