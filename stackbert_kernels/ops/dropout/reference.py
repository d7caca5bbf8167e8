"""Dropout in plain PyTorch."""

from torch import Tensor

from stackbert_kernels.ops import philox


def dropout(x: Tensor, rng: Tensor, site: int, threshold: int) -> Tensor:
    return (x * philox.row_factors(rng, site, threshold, x)).to(x.dtype)
