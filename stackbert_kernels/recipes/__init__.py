"""Training methods: a file each, a function from a base configuration to one with stages, the paper in its docstring."""

from __future__ import annotations

from stackbert_kernels.recipes.baseline import BaselineOptions, baseline
from stackbert_kernels.recipes.mslt import MsltOptions, mslt

RECIPES = {
    "baseline": (baseline, BaselineOptions),
    "mslt": (mslt, MsltOptions),
}
"""What --recipe accepts: the function, called as function(base, options), and the class of its options."""

__all__ = ["RECIPES", "BaselineOptions", "MsltOptions", "baseline", "mslt"]
