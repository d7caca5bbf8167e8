"""Dropout masks, bit for bit those of the contract as the CPU's plain PyTorch draws them, forward and backward."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import SITE, rng_on
from gpu_devices import Cuda, devices, targets
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.ops import philox

THRESHOLD, P = 77, 0.3


def kept_of_dropout(x: Tensor, **how) -> tuple[Tensor, Tensor]:
    y = ops.dropout(x, P, **how)
    return y != 0, torch.autograd.grad(y, x, torch.ones_like(y))[0] != 0


def kept_of_add(x: Tensor, **how) -> tuple[Tensor, Tensor]:
    y = ops.dropout_add(x, torch.zeros_like(x), dropout_p=P, **how)
    return y != 0, torch.autograd.grad(y, x, torch.ones_like(y))[0] != 0


def kept_of_norm(x: Tensor, **how) -> tuple[Tensor, Tensor]:
    """Of a sum that is 0 or 1 / keep rate, what was kept lies above the mean."""
    one, zero = torch.ones(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device)
    y = ops.dropout_add_layer_norm(x, torch.zeros_like(x), one, zero, dropout_p=P, **how)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return y > 0, torch.autograd.grad(y, x, dy)[0] != 0


KEPT = {"dropout": kept_of_dropout, "dropout_add": kept_of_add, "dropout_add_layer_norm": kept_of_norm}


@pytest.mark.parametrize("step", [0, 1, 2**33 + 5])
@pytest.mark.parametrize(("device", "op", "impl"), targets(*KEPT))
def test_row_masks(device, op, impl, step):
    few = (9, 70) if device is not Cuda and impl == "triton" else (37, 333)
    for rows, columns in (few, (70_000, 64)) if device is Cuda else (few,):
        wanted = philox.row_bytes(rng_on("cpu", step), SITE, rows, columns) >= THRESHOLD
        x = torch.ones(rows, columns, device=device.kind, requires_grad=True)
        for kept in KEPT[op](x, rng=rng_on(device.kind, step), site=SITE, impl=impl):
            assert torch.equal(kept.cpu(), wanted), (
                f"{(kept.cpu() != wanted).sum()} of {wanted.numel()} decisions differ"
            )


@pytest.mark.parametrize(("device", "op", "impl"), targets("embedding_layer_norm"))
def test_embedding_masks(device, op, impl):
    """Half is dropped, so that factors are 0 and 2: with powers of two as incoming gradients, the bits of the bias' gradient are a column
    of decisions."""
    tokens, columns, rng = 20, 333 if device is Cuda or impl != "triton" else 40, rng_on(device.kind)
    index = torch.arange(tokens, device=device.kind)
    tables = [
        torch.randn(tokens, columns, generator=torch.Generator().manual_seed(i)).to(device.kind) for i in range(3)
    ]
    one, bias = torch.ones(columns, device=device.kind), torch.zeros(columns, device=device.kind, requires_grad=True)
    y = ops.embedding_layer_norm(index, index, index, *tables, one, bias, dropout_p=0.5, rng=rng, site=SITE, impl=impl)
    powers = 2.0 ** torch.arange(tokens, device=device.kind)[:, None].expand(tokens, columns)
    (dbias,) = torch.autograd.grad(y, bias, powers.contiguous())
    wanted = philox.row_bytes(rng_on("cpu"), SITE, tokens, columns) >= 128
    assert torch.equal(y.cpu() != 0, wanted)
    assert torch.equal((dbias.long().cpu() >> torch.arange(1, tokens + 1)[:, None]) & 1 == 1, wanted)


@pytest.mark.parametrize(("device", "op", "impl"), targets("attention"))
def test_attention_masks(device, op, impl):
    """With q = k = 0 each probability is 1 / S. Unit vectors as values show a row of decisions in the output; as gradients of the output, a
    column of them in the gradient of the values."""
    length, heads, D = (201, 2, 64) if device is Cuda or impl != "triton" else (70, 1, 64)
    before = 7  # the sequence that is looked at is the second one
    rng = rng_on(device.kind)
    cu = torch.tensor([0, before, before + length], dtype=torch.int32, device=device.kind)
    seen, seen_backward = (torch.zeros(heads, length, length, dtype=torch.bool) for _ in range(2))
    for first in range(0, length, D):
        unit = torch.zeros(before + length, heads, D, device=device.kind)
        index = torch.arange(first, min(first + D, length), device=device.kind)
        unit[before + index, :, index - first] = 1
        zero, v = torch.zeros_like(unit), unit.clone().requires_grad_()
        y = ops.attention_varlen(zero, zero, v, cu, length, dropout_p=P, rng=rng, site=SITE, impl=impl)
        (dv,) = torch.autograd.grad(y, v, unit)
        there = index.cpu()
        seen[:, :, there] = y[before:].transpose(0, 1)[:, :, : len(index)].cpu() != 0  # [query, key]
        seen_backward[:, there] = (dv[before:].permute(1, 2, 0)[:, : len(index)] != 0).cpu()  # [key] of each query
    wanted = philox.attention_bytes(rng_on("cpu"), SITE, 1, heads, length, length) >= THRESHOLD
    for name, mask in (("forward", seen), ("backward", seen_backward)):
        assert torch.equal(mask, wanted), f"{name}: {(mask != wanted).sum()} of {wanted.numel()} decisions differ"


@pytest.mark.parametrize("device", devices())
def test_bytes_of_the_reference(device):
    """The words behind them pass through 64-bit products, whose signs a device may treat in its own way."""
    assert torch.equal(
        philox.row_bytes(rng_on(device.kind), SITE, 70, 130).cpu(), philox.row_bytes(rng_on("cpu"), SITE, 70, 130)
    )
    assert torch.equal(
        philox.attention_bytes(rng_on(device.kind), 1, 2, 3, 70, 130).cpu(),
        philox.attention_bytes(rng_on("cpu"), 1, 2, 3, 70, 130),
    )
