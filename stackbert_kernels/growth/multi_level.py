"""The operators of the multi-level framework (Zou et al. 2024, arXiv 2404.07999): coalesce, de-coalesce, interpolate.

Coalescing makes one index of a group of them: outputs are averaged, inputs added up. De-coalescing is the way back: outputs are copied,
inputs split, so that coalesce(decoalesce(x)) = x. In width it keeps the function (but for the eps of the norm after the embeddings, which
all are split); in depth, where layers are averaged and copied, it does not. What is made of copies has exact twins; interpolation with the
weights from before parts them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stackbert_kernels.config import LAYER_GROUPS, ConfigError, ModelConfig, Stage, check_coalescing
from stackbert_kernels.growth.axes import AxisMap, ShapeMap, load, mapped_state, reshaped
from stackbert_kernels.model.bert import Bert

Kept = list[dict[str, Tensor]]
"""The weights of each larger model, by name, from before it was coalesced; the last one is the next to come back."""


def grouped(old: int, new: int, *, adjacent: bool = False) -> AxisMap:
    """6, 3: [(0, 3), (1, 4), (2, 5)]; adjacent: [(0, 1), (2, 3), (4, 5)]."""
    size = old // new
    if adjacent:
        return AxisMap(tuple(tuple(range(i * size, (i + 1) * size)) for i in range(new)), old)
    return AxisMap(tuple(tuple(range(i, old, new)) for i in range(new)), old)


def coalescing(large: ModelConfig, small: ModelConfig, *, layers: str = "adjacent") -> ShapeMap:
    """The maps from `large`'s shape to `small`'s; their `inverse()` is the way back.

    Heads are whole, head i with head i + heads / 2; the residual stream and the inner neurons likewise. layers: groups of adjacent ones,
    or apart, as heads.
    """
    if layers not in LAYER_GROUPS:
        raise ConfigError(f"multi_level: layers must be grouped {' or '.join(LAYER_GROUPS)}, got {layers!r}")
    check_coalescing(large, small, where="multi_level: ")
    return ShapeMap(
        residual=grouped(large.hidden, small.hidden),
        heads=grouped(large.heads, small.heads),
        inner=grouped(large.inner, small.inner),
        layers=grouped(large.layers, small.layers, adjacent=layers == "adjacent"),
        head_dim=large.head_dim,
        tied="embeddings",
    )


@torch.no_grad()
def interpolated(before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) before + alpha after, of all tensors by name; exactly one of them at 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"multi_level: alpha must be in [0, 1], got {alpha}")
    if before.keys() != after.keys():
        raise ConfigError("multi_level: both models must have the same parameters")
    return {name: torch.lerp(before[name], after[name], alpha) for name in before}


def reshape(
    model: Bert, moments: Mapping[str, Tensor], stage: Stage, shape: ModelConfig, kept: Kept
) -> tuple[Bert, dict[str, Tensor]]:
    """The model of `shape` that stage.grow makes of `model`, and the optimizer's state_dict for it, mapped by the same maps.

    coalesce puts the model's weights into `kept`; decoalesce takes the last ones from there and keeps stage.alpha of its own.
    """
    if stage.grow == "coalesce":
        kept.append({name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()})
        maps = coalescing(model.config, shape, layers=stage.layer_groups)
        return reshaped(model, maps), mapped_state(moments, maps)
    maps = coalescing(shape, model.config, layers=stage.layer_groups).inverse()
    new = reshaped(model, maps)
    before = {name: tensor.to(model.word.device) for name, tensor in kept.pop().items()}
    load(new, interpolated(before, dict(new.named_parameters()), stage.alpha))
    return new, mapped_state(moments, maps)
