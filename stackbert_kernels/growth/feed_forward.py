"""Growth of the feed-forward layer alone (CompoundGrow, Gu et al. 2021, arXiv 2010.12562): its inner neurons are copied in turn.

Of k copies of a neuron each reads what it read, and gives a k-th of what it gave: W1 and b1 are tiled, W2 is tiled and divided by k, b2
stays. The function is kept exactly, and Adam's moments follow as gradients do (growth/axes.py).

Copies that share equally, as published, stay twins: dropout comes after their sum, so their gradients are equal in every step, and so is what
the optimizer makes of them. Only rounding can part them, and on the CPU it does not in hundreds of steps: the layer is as good as half as
wide. `split_noise` parts them at once and keeps the function, too: the shares differ, and sum to the whole.

C hidden, I inner neurons before, k copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stackbert_kernels.config import ModelConfig, Stage
from stackbert_kernels.growth.axes import LAYER, AxisMap, ShapeMap, mapped, mapped_state
from stackbert_kernels.model.bank import generator_for
from stackbert_kernels.model.bert import Bert

CHANGED = tuple(slot for slot, dims in LAYER.items() if any(dim[0] == "inner" for dim in dims))
"""Of a layer's parameters: inner_weight, inner_bias, outer_weight."""


def tiling(model: Bert, inner: int) -> ShapeMap:
    """The map of all neurons in turn, [0, 1, 2] -> [0, 1, 2, 0, 1, 2], and of nothing else."""
    config = model.config

    def same(n: int) -> AxisMap:
        return AxisMap.of(range(n), n)

    turns = AxisMap.of([i % config.inner for i in range(inner)], config.inner)
    return ShapeMap(same(config.hidden), same(config.heads), turns, same(model.depth), config.head_dim)


@torch.no_grad()
def widened(
    model: Bert, moments: Mapping[str, Tensor], stage: Stage, shape: ModelConfig, *, seed: int
) -> tuple[Bert, dict[str, Tensor], dict]:
    """The model of `shape`, which has a wider feed-forward layer, with the rows and the depth of `model`; the optimizer's state_dict for
    it; and what the log says. Whatever has no inner axis stays bit for bit."""
    maps = tiling(model, shape.inner)
    layers = tuple(f"bank.layers.{i}." for i in range(model.depth))
    named = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("bank.") or n.startswith(layers)}
    new = Bert(shape, seed=seed, device=model.word.device, impl=model.impl, rows=len(model.bank)).to(model.word.dtype)
    new.use(model.depth)
    tensors = named | mapped(_changed(named), maps)
    copies = shape.inner // model.config.inner
    if stage.split_noise:
        for i in range(model.depth):
            name = f"bank.layers.{i}.outer_weight"
            tensors[name] += _unequal_shares(tensors[name], copies, stage.split_noise, seed, i)
    parameters = dict(new.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    counts = {name: t for name, t in moments.items() if name.startswith("bank.layers.") and name.endswith(".step")}
    state = {name: t.clone() for name, t in moments.items()} | mapped_state(_changed(moments) | counts, maps)
    new.transformers_fields = dict(model.transformers_fields)
    said = {
        "from_inner": model.config.inner,
        "inner": shape.inner,
        "copies": copies,
        "copies_have_equal_gradients": not stage.split_noise,
    }
    return new.train(model.training), state, said


def _changed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of parameters with an inner axis, moments included."""
    parts = {name: name.split(".") for name in tensors}
    return {name: tensors[name] for name, part in parts.items() if len(part) > 3 and part[3] in CHANGED}


def _unequal_shares(share: Tensor, copies: int, size: float, seed: int, layer: int) -> Tensor:
    """What to add to the tiled matrix [C, k I]: normal noise in proportion to the equal shares, which sums to nothing over the copies."""
    shape, generator = (len(share), copies, share.shape[1] // copies), generator_for(seed, f"split {layer}")
    draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    draws -= draws.mean(1, keepdim=True)
    return size * share * draws.flatten(1).to(share)
