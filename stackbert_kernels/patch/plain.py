"""Whether a module does only what its class says, so that an op may read its parameters instead of calling it.

Hooks, LoRA and other wrappers, parametrizations (which change the class) and an own `forward` (accelerate's) make it more than that. Asked
at every call: any of these can come after `patch`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_P, LARGEST_P = 1 / 512, 511 / 512  # what the ops realise as no dropout, and what they refuse


def plain(module: object, cls: type[nn.Module]) -> bool:
    return type(module) is cls and not hooked(module) and "forward" not in module.__dict__


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_norm(norm: object) -> bool:
    """A LayerNorm with weight and bias over the last dimension."""
    return plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None and norm.weight.dim() == 1


def dropout_p(dropout: object) -> float | None:
    """The chance that applies now; None where the ops cannot do what it does."""
    if plain(dropout, nn.Identity):
        return 0.0
    if not plain(dropout, nn.Dropout):
        return None
    return realised(dropout.p if dropout.training else 0.0)


def realised(p: float) -> float | None:
    return p if p == 0.0 or SMALLEST_P < p < LARGEST_P else None


def linear(dense: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What dense makes of x without its bias, and that bias; or all of it and None, by calling it."""
    if plain(dense, nn.Linear):
        return F.linear(x, dense.weight), dense.bias
    return dense(x), None


def taken(parameter: Tensor, x: Tensor) -> Tensor:
    """In a dtype that the ops take beside x: under autocast a bfloat16 model may have float16 activations."""
    return parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.to(x.dtype)


def new_rng(p: float, x: Tensor) -> Tensor | None:
    """Of torch's generator on x's device, as torch.nn.functional.dropout does: nothing waits, and CUDA graphs can replay it."""
    return torch.randint(2**62, (2,), device=x.device) if p else None
