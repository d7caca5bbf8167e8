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

from stackbert_kernels.config import ConfigError, ModelConfig
from stackbert_kernels.growth.axes import AxisMap, ShapeMap

LAYER_GROUPS = ("adjacent", "apart")


def grouped(old: int, new: int, what: str, *, adjacent: bool = False) -> AxisMap:
    """6, 3: [(0, 3), (1, 4), (2, 5)]; adjacent: [(0, 1), (2, 3), (4, 5)]."""
    if new < 1 or old % new:
        raise ConfigError(f"multi_level: {what} must be a multiple of the smaller model's, got {old} -> {new}")
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
    if large.head_dim != small.head_dim:
        raise ConfigError(
            f"multi_level: heads are grouped whole, so every level must have the same head dim (hidden / heads), "
            f"got {large.head_dim} and {small.head_dim}"
        )
    return ShapeMap(
        residual=grouped(large.hidden, small.hidden, "hidden"),
        heads=grouped(large.heads, small.heads, "heads"),
        inner=grouped(large.inner, small.inner, "inner"),
        layers=grouped(large.layers, small.layers, "layers", adjacent=layers == "adjacent"),
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
