"""How recipes share out steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stackbert_kernels.config import ConfigError

LONGEST_REWARM = 1000


def divide(steps: int, weights: Sequence[float]) -> list[int]:
    """`steps` in proportion to `weights`, in whole numbers that sum to it: each boundary is rounded, not each share."""
    total, done, shares = sum(weights), 0.0, []
    if not steps * total < math.inf:
        raise ConfigError(f"stage_weights are too large to share out {steps} steps by, got {tuple(weights)}")
    for weight in weights:
        first = round(steps * done / total)
        done += weight
        shares.append(round(steps * done / total) - first)
    return shares


def rewarm(steps: int, wanted: int | None) -> int:
    """Steps over which the rate rises again in a stage of `steps`; None: a tenth of them, at most 1000."""
    return min(steps, min(LONGEST_REWARM, steps // 10) if wanted is None else wanted)
