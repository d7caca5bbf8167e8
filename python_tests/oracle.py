"""How results are judged: against float64, with PyTorch's own error in the same dtype as the measure."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate_as_torch(name: str, actual: Tensor, exact: Tensor, baseline: Tensor, slack: float = 2.0) -> None:
    """actual: ours.  exact: reference in float64.  baseline: PyTorch in actual's dtype on the same input.

    One ulp of the largest value is allowed on top: PyTorch's error may be zero by luck.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, wanted {list(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if exact.numel() == 0:
        return
    ours, torchs = (actual.double() - exact).abs().max(), (baseline.double() - exact).abs().max()
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert ours <= slack * torchs + ulp, (
        f"{name}: max error {ours:.3e}, PyTorch's is {torchs:.3e} (allowed {slack}x + {ulp:.1e})"
    )
