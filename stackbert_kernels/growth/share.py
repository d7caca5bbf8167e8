"""Sharing as data: the row of the bank that each layer reads, and what unsharing copies.

Several layers read one row; their gradients add up in it. Unsharing is a duplication of rows, like growth in depth: weights and moments of a
new row are those of the row that its layers read until then, so that the function stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence


def unshare(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """For each row that the layers read by the map `new`, the row that they read by `old` (config.check_unsharing holds).

    (0, 0, 0, 0) -> (0, 1, 2, 3): [0, 0, 0, 0].  (0, 1, 0, 1) -> (0, 1, 2, 3): [0, 1, 0, 1].  (0, 0, 1, 1) -> (0, 0, 1, 2): [0, 1, 1].
    """
    return [old[new.index(row)] for row in range(max(new) + 1)]
