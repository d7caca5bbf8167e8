"""What reads the encoder's output: the masked-LM head and the sentence-pair head.

R rows, C hidden, E width of the embeddings, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels import ops

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # ModelConfig.activation -> ops.bias_gelu's argument


class Affine(nn.Module):
    """A weight and a bias; what is done with them stands where they are used."""

    def __init__(self, weight: tuple[int, ...], bias: int, device: torch.device | str):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight, device=device))
        self.bias = nn.Parameter(torch.zeros(bias, device=device))


class MlmHead(nn.Module):
    """dense [C -> E] + gelu + layer norm, then the decoder: the tied word embedding [V, E], which the caller passes, and a bias.

    `decoder` is the private copy of the word embedding in stages that untie it, else None.
    """

    def __init__(
        self, hidden: int, width: int, vocab_size: int, activation: str, eps: float, device: torch.device | str
    ):
        super().__init__()
        self.approximate, self.eps = APPROXIMATE[activation], eps
        self.transform = Affine((width, hidden), width, device)
        self.norm = Affine((width,), width, device)
        self.bias = nn.Parameter(torch.zeros(vocab_size, device=device))
        self.register_parameter("decoder", None)

    def features(self, hidden: Tensor, impl: str) -> Tensor:
        """[R, C] -> [R, E]: what the decoder multiplies."""
        x = F.linear(hidden, self.transform.weight)
        x = ops.bias_gelu(x, self.transform.bias, approximate=self.approximate, impl=impl)
        return ops.layer_norm(x, self.norm.weight, self.norm.bias, self.eps, impl=impl)


class PairHead(nn.Module):
    """pooler (dense + tanh on [CLS]), then two classes: does the second part follow (nsp), are the parts swapped (sop)."""

    def __init__(self, hidden: int, device: torch.device | str):
        super().__init__()
        self.pooler = Affine((hidden, hidden), hidden, device)
        self.classifier = Affine((2, hidden), 2, device)

    def forward(self, first: Tensor) -> Tensor:
        """first [B, C], the encoder's output at [CLS] -> logits [B, 2] float32 or wider"""
        pooled = torch.tanh(F.linear(first, self.pooler.weight, self.pooler.bias))
        logits = F.linear(pooled, self.classifier.weight, self.classifier.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
