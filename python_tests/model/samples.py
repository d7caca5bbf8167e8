"""Small models and batches for the model's tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model import Bert

TINY = {"layers": 4, "hidden": 32, "heads": 2, "vocab_size": 97, "max_position": 24, "dropout": 0.1, "init_std": 0.2}


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    token_types: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    masked: Tensor
    labels: Tensor
    pair_labels: Tensor | None
    windows: object = None


def tiny(seed: int = 0, **changes) -> Bert:
    """Weights are larger than BERT's initial ones, vectors are random: every parameter matters."""
    model = Bert(ModelConfig(**(TINY | changes)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(lengths=(9, 1, 24, 13), *, pair: bool = False, vocab_size: int = 97, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    masked = (positions > 0).nonzero().flatten()[::3]
    return Batch(
        input_ids=torch.randint(0, vocab_size, (T,), generator=g),
        token_types=torch.randint(0, 2, (T,), generator=g),
        positions=positions,
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        max_seqlen=max(lengths),
        masked=masked,
        labels=torch.randint(0, vocab_size, (len(masked),), generator=g),
        pair_labels=torch.randint(0, 2, (len(lengths),), generator=g) if pair else None,
    )
