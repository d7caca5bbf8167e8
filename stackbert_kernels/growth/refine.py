"""From relaxed layers to whole ones (CoRe, Yang et al. 2020, arXiv 2011.13633), exactly: the function stays what it was.

A product of two feed-forward matrices becomes one matrix, whose rank then grows by itself. Queries and keys of width r get the values' width
D: what they had is kept, queries times sqrt(D / r), for scores are divided by sqrt(D) from then on. The new channels of queries begin at zero and
those of keys at random, so that they add nothing to a score and yet learn: at the first step queries alone (the gradient of either is the
other), keys from the second on. Were both zero, neither would ever have a gradient.

C hidden, D head dim, H heads, r width of a head's queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stackbert_kernels.config import ModelConfig, OptimConfig, Stage
from stackbert_kernels.model.bank import generator_for
from stackbert_kernels.model.bert import Bert

PRODUCTS = {"inner_weight": ("inner_expand", "inner_reduce"), "outer_weight": ("outer_expand", "outer_reduce")}
"""Slot of a whole layer -> the slots of which it is the product."""


@torch.no_grad()
def refine(
    model: Bert, moments: Mapping[str, Tensor], stage: Stage, shape: ModelConfig, *, seed: int, optim: OptimConfig
) -> tuple[Bert, dict[str, Tensor]]:
    """The model of `shape`, whose rank or score_dim is 0 where `model` has one, and the optimizer's state_dict for it.

    stage.optimizer_state "copy": moments of what is there before and after go on, those of products and of new channels begin at zero (no map
    leads to them); "zero": all layers begin without. The new keys are a function of (seed, row).
    """
    old = model.config
    new = Bert(shape, device=model.word.device, impl=model.impl, rows=len(model.bank)).to(model.word.dtype)
    new.use(model.depth, rows=model.rows, ffn_rows=model.ffn_rows)
    outside = new.always_on_parameters()
    for name, parameter in model.always_on_parameters().items():
        outside[name].copy_(parameter)
    for i, row in enumerate(model.bank.weights):
        layer = whole_layer(
            {slot.name: slot.view(row) for slot in model.bank.layout}, old, shape, new_keys(old, seed, i)
        )
        for slot in new.bank.layout:
            slot.view(new.bank.weights[i]).copy_(layer[slot.name])
    new.transformers_fields = dict(model.transformers_fields)
    return new.train(model.training), _moments(moments, new, old, optim, keep=stage.optimizer_state != "zero")


def new_keys(model: ModelConfig, seed: int, row: int) -> Tensor:
    """The new channels of the keys' weights [H, D - r, C], as large as those of a new layer."""
    channels = torch.empty(model.heads, model.head_dim - (model.score_dim or model.head_dim), model.hidden)
    return channels.normal_(0, model.init_std, generator=generator_for(seed, f"new keys of layer {row}"))


def whole_layer(layer: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig, keys: Tensor) -> dict[str, Tensor]:
    """The parameters of a layer of `new`, by slot, of one of `old`. Products are taken in float64."""
    result = dict(layer)
    if old.rank and not new.rank:
        for slot, (expand, reduce) in PRODUCTS.items():
            left, right = result.pop(expand), result.pop(reduce)
            result[slot] = (left.double() @ right.double()).to(left.dtype)
    if old.score_dim and not new.score_dim:
        scale = (old.head_dim / old.score_dim) ** 0.5
        result["qkv_weight"] = _wider(layer["qkv_weight"], old, scale, keys)
        result["qkv_bias"] = _wider(layer["qkv_bias"], old, scale)
    return result


def _wider(qkv: Tensor, model: ModelConfig, scale: float, keys: Tensor | None = None) -> Tensor:
    """[2 H r + C, ...] -> [3 C, ...]: queries times `scale`; new channels are zero, those of the keys `keys`."""
    H, D, r = model.heads, model.head_dim, model.score_dim
    q, k, v = (part.unflatten(0, (H, -1)) for part in qkv.split(model.qkv_widths))
    full = qkv.new_zeros(3, H, D, *qkv.shape[1:])
    full[0, :, :r], full[1, :, :r], full[2] = scale * q, k, v
    if keys is not None:
        full[1, :, r:] = keys.to(full)
    return full.flatten(0, 2)


def _moments(
    moments: Mapping[str, Tensor], new: Bert, old: ModelConfig, optim: OptimConfig, *, keep: bool
) -> dict[str, Tensor]:
    """A layer has one count of steps, which the moments that begin at zero share with those that go on. With the old count they would be
    taken for means over many steps, and a new matrix would move several times too far at first. So the count is what the mean of gradients
    remembers, 1 / (1 - beta1) steps, at most; what goes on is scaled to be the same means at that count."""
    result = {name: tensor.clone() for name, tensor in moments.items() if not name.startswith("bank.layers.")}
    scale = (old.head_dim / (old.score_dim or old.head_dim)) ** 0.5  # gradients change the other way round than weights
    for i in range(new.bank_rows):
        prefix = f"bank.layers.{i}."
        before = float(moments[f"{prefix}step"])
        after = min(before, round(1 / (1 - optim.beta1))) if keep else 0.0
        result[f"{prefix}step"] = torch.full_like(moments[f"{prefix}step"], after)
        for kind, beta, power in (("exp_avg", optim.beta1, 1), ("exp_avg_sq", optim.beta2, 2)):
            same_mean = (1 - beta**after) / (1 - beta**before) if after else 0.0
            for slot in new.bank.layout:
                name = f"{prefix}{slot.name}.{kind}"
                moment = moments.get(name)
                if moment is None:  # of a product
                    moment = slot.view(new.bank.weights[i]).new_zeros(slot.shape)
                elif moment.shape != slot.shape:
                    moment = _wider(moment, old, scale**-power)
                result[name] = moment * same_mean
    return result
