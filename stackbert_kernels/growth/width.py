"""Width growth (bert2BERT, Chen et al. 2022, arXiv 2110.07143): neurons are copied and their outgoing weights divided among the copies.

FPI, function-preserving initialisation, does that and no more. It is exact where the residual stream is read evenly (each old index by
equally many new ones), whatever the maps of heads and inner neurons; else layer norms see means and variances of unevenly repeated
values, and the function is kept only nearly. AKI, advanced knowledge initialisation, takes new heads and new inner neurons from the layer
above, so that copies differ from the start; it keeps no function, and the top layer has no layer above: there it is FPI.

Which index a new one copies: "tile", all of them in turn (exact where widths are multiples), or "random", as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stackbert_kernels.config import ConfigError, ModelConfig
from stackbert_kernels.growth.axes import LAYER, AxisMap, ShapeMap, in_layers, mapped
from stackbert_kernels.growth.source import check_widening
from stackbert_kernels.model.bank import generator_for


def wider(old: int, new: int, choice: str, seed: int, what: str) -> AxisMap:
    """3, 5, tile: [0, 1, 2, 0, 1]. random: [0, 1, 2] and then any, as (seed, what) says."""
    if new < old:
        raise ConfigError(f"width map: {what} can only grow, got {old} -> {new}")
    if choice == "tile":
        return AxisMap.of([i % old for i in range(new)], old)
    drawn = torch.randint(old, (new - old,), generator=generator_for(seed, f"width map of {what}"))
    return AxisMap.of([*range(old), *drawn.tolist()], old)


def stack_top(old: int, new: int) -> list[int]:
    """[0, 1, 2], 8 -> [0, 1, 2, 0, 1, 2, 1, 2]: whole copies on top of each other, then the topmost layers once more."""
    return list(range(old)) * (new // old) + list(range(old - new % old, old))


def widening(source: ModelConfig, target: ModelConfig, *, choice: str = "tile", seed: int = 0) -> ShapeMap:
    """The maps from a model of `source`'s shape to one of `target`'s; ConfigError if it is not as wide and as deep, or has another head dim."""
    check_widening(source, target)
    return ShapeMap(
        residual=wider(source.hidden, target.hidden, choice, seed, "hidden"),
        heads=wider(source.heads, target.heads, choice, seed, "heads"),
        inner=wider(source.inner, target.inner, choice, seed, "inner"),
        layers=AxisMap.of(stack_top(source.layers, target.layers), source.layers),
        head_dim=source.head_dim,
    )


@torch.no_grad()
def advanced(tensors: Mapping[str, Tensor], maps: ShapeMap, *, gradients: bool = False) -> dict[str, Tensor]:
    """As axes.mapped, but new heads and inner neurons of a layer are those of the layer above (AKI)."""
    result = mapped(tensors, maps.width_alone(), gradients=gradients)
    for layer in range(maps.layers.old - 1):  # from below: what it takes from the layer above is not yet replaced there
        for slot, dims in LAYER.items():
            for dim, (axis, _) in enumerate(dims):
                if axis != "residual" and maps.axes[axis].fresh:
                    own, above = (f"bank.layers.{i}.{slot}" for i in (layer, layer + 1))
                    new = torch.tensor(maps.axes[axis].fresh, device=result[own].device)
                    result[own].index_copy_(dim, new, result[above].index_select(dim, new))
    return in_layers(result, maps.layers)


CHANGES = {"fpi": mapped, "aki": advanced}
"""By the names of config.FROM_SOURCE."""
