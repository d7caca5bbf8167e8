"""One function that applies any growth map to weights and optimizer moments alike."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.config import UNSHARE, Stage
from stackbert_kernels.growth.depth import IDENTITY, RANDOM, layer_map
from stackbert_kernels.growth.share import unshare
from stackbert_kernels.model.bert import Bert

LAST_OF_BRANCH = ("out_weight", "out_bias", "outer_weight", "outer_expand", "outer_bias")
"""What a layer adds to the residual stream is zero when these are."""


class Moments(Protocol):
    """What growth needs of an optimizer: banks of the shape of the weights' bank, and a count of steps a row."""

    exp_avg: Tensor  # [L, P]
    exp_avg_sq: Tensor  # [L, P]
    steps: Tensor  # [L]

    def reset(self) -> None: ...


@torch.no_grad()
def grow(model: Bert, optimizer: Moments | None, stage: Stage, *, seed: int) -> list[int]:
    """Grows `model` to `stage` by the operator `stage.grow`, in place; returns the map of the bank's rows that was applied.

    Rows are copied, never aliased. Moments and step counts follow the map (stage.optimizer_state "copy"; a fresh row has none),
    start at zero in the rows that changed ("zero"), or in all parameters ("reset"). Fresh rows depend on (seed, layer) alone.
    The caller sets the window next: model.use, then optimizer.set_window.
    """
    if stage.grow == UNSHARE:
        rows = unshare(model.rows, stage.attention_rows)
    else:
        rows = layer_map(stage.grow, model.depth, stage.depth)
    sources = [i if source < 0 else source for i, source in enumerate(rows)]
    new = len(rows)
    banks = [model.bank.weights]
    if optimizer is not None and stage.optimizer_state == "reset":
        optimizer.reset()
    elif optimizer is not None:
        banks += [optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps]
    ops.duplicate_banks_([bank[:new] for bank in banks], sources, impl=model.impl)
    for i, source in enumerate(rows):
        if source in (RANDOM, IDENTITY):
            model.initialise_row(i, seed)
        if source == IDENTITY:
            for slot in model.bank.layout:
                if slot.name in LAST_OF_BRANCH:
                    slot.view(model.bank.weights[i]).zero_()
    without = [i for i, source in enumerate(rows) if source < 0 or (source != i and stage.optimizer_state == "zero")]
    for moments in banks[1:]:
        for i in without:
            moments[i].zero_()
    model.depth, model.rows, model.ffn_rows = stage.depth, stage.attention_rows, stage.feed_forward_rows
    return rows
