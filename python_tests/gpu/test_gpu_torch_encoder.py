"""A patched nn.TransformerEncoder on a GPU beside the same one unpatched."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_devices import devices
from torch import Tensor, nn

import stackbert_kernels as sbk

LENGTHS, LONGEST, C = (40, 1, 17, 33), 40, 128


def small_encoder(device, norm_first: bool, p: float) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, 2, 160, p, "gelu", batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(C), enable_nested_tensor=False).to(device.kind).train()


def small_batch(device) -> tuple[Tensor, Tensor]:
    """x [B, S, C] and its padding [B, S], True = no token."""
    x = torch.randn(len(LENGTHS), LONGEST, C, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(LONGEST) >= torch.tensor(LENGTHS)[:, None]
    return x.to(device.kind), padding.to(device.kind)


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpad"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("device", devices())
def test_outputs_and_gradients(device, how, norm_first, unpad):
    """Against float64, relative to the largest: no tensor further off than four times PyTorch's worst one. The same dtype of the output,
    which under autocast is another one on a GPU than on a CPU."""
    model, (x, padding) = small_encoder(device, norm_first, 0.0), small_batch(device)
    exact = copy.deepcopy(model).double()
    if how == "bf16":
        model = model.bfloat16()
    patched = copy.deepcopy(model)
    sbk.patch(patched, unpad=unpad)
    found, dtypes = [], []
    for made in (exact, model, patched):
        given = x.to(next(made.parameters()).dtype)
        with torch.autocast(device.kind, torch.bfloat16, enabled=how == "autocast" and made is not exact):
            y = made(given, src_key_padding_mask=padding)[~padding]
        loss = (y.double() * torch.linspace(-1, 1, C, dtype=torch.float64, device=y.device)).mean()
        found.append([y.detach(), *torch.autograd.grad(loss, list(made.parameters()))])
        dtypes.append(y.dtype)
    assert dtypes[1] == dtypes[2]
    theirs, ours = (
        [float((a - b).abs().max() / b.abs().max()) for a, b in zip(of, found[0], strict=True)] for of in found[1:]
    )
    eps = torch.finfo(torch.float32 if how == "fp32" else torch.bfloat16).eps
    assert max(ours) <= 4 * max(eps, *theirs)


@pytest.mark.parametrize("device", devices())
def test_dropout_by_the_seed_and_in_a_captured_graph(device):
    """Masks come from torch's generator on the device, which a captured graph advances."""
    model, (x, _) = small_encoder(device, False, 0.2), small_batch(device)
    sbk.patch(model)

    def step() -> list[Tensor]:
        return [model(x).detach()]

    torch.manual_seed(5)
    first = step()[0]
    torch.manual_seed(5)
    assert torch.equal(step()[0], first)
    outputs, replay = device.captured(step)
    replay()
    kept = outputs[0].clone()
    replay()
    assert torch.isfinite(kept).all() and not torch.equal(outputs[0], kept)
