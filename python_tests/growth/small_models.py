"""Models in float64 for the tests of maps between shapes, what they compute, and how near two results must be."""

from __future__ import annotations

from dataclasses import replace

import torch
from model.samples import batch, tiny

from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model.bert import Bert

SMALL = {"layers": 3, "hidden": 16, "heads": 2, "inner": 24, "dropout": 0.0}  # a head dim of 8
ROUNDING = 1e-12  # float64 sums of some hundred terms of size 1, through six norms
EPS = 1e-9  # norm_eps 1e-12 beside variances of 1e-3 and more


def small(**changes) -> Bert:
    model = tiny(**(SMALL | changes)).double().eval()
    model.impl = "reference"
    return model


def shape(model: Bert, **changes) -> ModelConfig:
    return replace(model.config, **changes)


def logits(model: Bert) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(48).view(2, 24), return_logits=True).logits


def gradients(model: Bert) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch(pair=model.pair is not None)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(actual, wanted, tolerance=ROUNDING):
    assert (actual - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max())


def parameters(model: Bert) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
