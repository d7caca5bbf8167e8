"""Lengths of sequences: all equal, or a natural mix."""

from __future__ import annotations

import torch


def equal(tokens: int, length: int) -> list[int]:
    """As many whole sequences as `tokens` hold."""
    return [length] * (tokens // length)


def natural(tokens: int, longest: int) -> list[int]:
    """Log-normal around 100 tokens, as paragraphs are, cut at `longest`; they sum to `tokens`. The same in every run."""
    drawn = torch.exp(4.6 + 0.8 * torch.randn(tokens, generator=torch.Generator().manual_seed(0)))
    lengths, left = [], tokens
    for length in drawn.clamp(8, longest).int().tolist():
        lengths.append(min(length, left))
        left -= lengths[-1]
        if left == 0:
            break
    return lengths
