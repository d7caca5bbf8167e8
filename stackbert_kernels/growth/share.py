"""Sharing as data: the row of the bank that each layer reads, and what unsharing copies.

Several layers read one row; their gradients add up in it. Unsharing is a duplication of rows, like growth in depth: weights and moments of a
new row are those of the row that its layers read until then, so that the function stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from stackbert_kernels.config import UNSHARE, Stage, Untying
from stackbert_kernels.model.bert import Bert

READINGS = 3
"""So many low readings in a row part the layers."""


def unshare(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """For each row that the layers read by the map `new`, the row that they read by `old` (config.check_unsharing holds).

    (0, 0, 0, 0) -> (0, 1, 2, 3): [0, 0, 0, 0].  (0, 1, 0, 1) -> (0, 1, 2, 3): [0, 1, 0, 1].  (0, 0, 1, 1) -> (0, 0, 1, 2): [0, 1, 1].
    """
    return [old[new.index(row)] for row in range(max(new) + 1)]


def part_layers(rows: Sequence[int], cosines: Sequence[float], low: int, untie: Untying) -> tuple[tuple[int, ...], int]:
    """The rows after a reading, and how many readings in a row were low. cosines[i] is of the gradients of layers i and i + 1; `low`
    counts the readings before."""
    if untie.split:
        parted = [0]
        for i, cosine in enumerate(cosines):
            new = rows[i + 1] != rows[i] or cosine < untie.below
            parted.append(parted[-1] + new)
        return tuple(parted), 0
    low = low + 1 if 2 * sum(cosine < untie.below for cosine in cosines) > len(cosines) else 0
    return (tuple(range(len(rows))), 0) if low == READINGS else (tuple(rows), low)


def parted(stage: Stage, rows: tuple[int, ...]) -> Stage:
    """`stage` as it is once its layers have parted so that they read `rows`."""
    if len(set(rows)) < stage.depth:
        return replace(stage, rows=rows, grow=UNSHARE)
    return replace(stage, rows=(), grow=UNSHARE, shared_gradient="sum", untie=Untying())


def gradient_cosines(model: Bert, backward: Callable[[], object]) -> list[float]:
    """Of the gradients of layers 0 and 1, 1 and 2, ..., each for itself though they share weights. `backward` runs the model forward
    and backward; weights, window and rows are afterwards as they were, gradients are zero."""
    rows, weights = model.rows, model.bank.weights.clone()
    embeddings, frozen_dropout = model.embeddings, model.frozen_dropout
    with torch.no_grad():
        model.bank.weights[: model.depth] = weights[list(rows)]
    model.use(model.depth, 0, embeddings, frozen_dropout)
    backward()
    gradients = model.bank.grads[: model.depth].double()  # [L, P]
    cosines = torch.cosine_similarity(gradients[:-1], gradients[1:], dim=1).tolist()
    with torch.no_grad():
        model.bank.weights.copy_(weights)
    model.use(model.depth, 0, embeddings, frozen_dropout, rows)
    model.zero_grad()
    return cosines
