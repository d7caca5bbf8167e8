"""A linear layer with a GELU behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels import ops


class BiasGELU(nn.Linear):
    """gelu(linear(x)), the linear layer's bias added where the GELU reads, by the op bias_gelu.

    It stands for the nn.Linear and the nn.GELU behind it, and loads the state dict of that nn.Linear: a GELU has none, and the bias that
    is fused is the linear layer's. So a checkpoint keeps its names where the GELU is dropped and this takes the place of the linear layer.

        x            [..., in_features]   any floating dtype; the parameters have the same (under autocast they are float32)
        approximate  "none" (the error function) or "tanh", as for nn.GELU
        returns      [..., out_features]

    Before:
        dense, gelu = nn.Linear(C, 4 * C), nn.GELU()
        y = gelu(dense(x))
    After:
        dense = sbk.nn.BiasGELU(C, 4 * C)
        y = dense(x)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        approximate: str = "none",
        impl: str = "auto",
    ):
        if not bias:
            raise ValueError(
                "BiasGELU: bias must be True: without one there is nothing to fuse; use nn.Linear and nn.GELU"
            )
        if approximate not in ("none", "tanh"):
            raise ValueError(f"BiasGELU: approximate must be one of none, tanh, got {approximate!r}")
        super().__init__(in_features, out_features, True, device, dtype)
        self.approximate, self.impl = approximate, impl

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_gelu(F.linear(x, self.weight), self.bias, approximate=self.approximate, impl=self.impl)

    def extra_repr(self) -> str:
        impl = "" if self.impl == "auto" else f", impl={self.impl!r}"
        return f"{super().extra_repr()}, approximate={self.approximate!r}{impl}"
