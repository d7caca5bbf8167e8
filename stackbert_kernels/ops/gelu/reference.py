"""gelu(x + bias) in plain PyTorch, computed in float32 (float64 for float64) and rounded once at the end."""

import math

import torch
from torch import Tensor

CUBIC = 0.044715  # of the tanh approximation


def _sum(x: Tensor, bias: Tensor) -> Tensor:
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32)) + bias


def _cdf(u: Tensor) -> Tensor:
    """The normal distribution function; erfc and not 1 + erf keeps the digits of its lower tail."""
    return 0.5 * torch.erfc(u * -math.sqrt(0.5))


def bias_gelu_fwd(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    u = _sum(x, bias)
    if approximate == "none":
        return (u * _cdf(u)).to(x.dtype)
    return (0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + CUBIC * u**3)))).to(x.dtype)


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    u = _sum(x, bias)
    if approximate == "none":
        slope = _cdf(u) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    else:
        t = torch.tanh(math.sqrt(2 / math.pi) * (u + CUBIC * u**3))
        slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * CUBIC * u * u)
    dx = dy * slope
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)
