"""Patched models of transformers on a GPU beside the same ones unpatched."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_devices import devices
from transformers import BertConfig, BertForMaskedLM

import stackbert_kernels as sbk

LENGTHS, LONGEST, VOCABULARY = (40, 1, 17, 33), 40, 211


def small_model(device, p: float) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=160,
        hidden_dropout_prob=p, attention_probs_dropout_prob=p, initializer_range=0.1,
    )  # fmt: skip
    return BertForMaskedLM._from_config(config, attn_implementation="sdpa").to(device.kind).train()


def small_batch(device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator).where(mask, 0)
    labels = ids.where((torch.rand(mask.shape, generator=generator) < 0.3) & mask, -100)
    given = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device.kind) for name, tensor in given.items()}


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", devices())
def test_losses_and_gradients(device, dtype, unpad):
    """Against float64: no further off than four times what the unpatched model is; bfloat16 by autocast."""
    model, given = small_model(device, 0.0), small_batch(device)
    patched, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    sbk.patch(patched, unpad=unpad)
    found = []
    for made in (exact, model, patched):
        with torch.autocast(device.kind, torch.bfloat16, enabled=dtype == torch.bfloat16 and made is not exact):
            loss = made(**given).loss
        found.append([loss, *torch.autograd.grad(loss, list(made.parameters()))])
    largest = max(g.abs().max() for g in found[0][1:])
    theirs = max((a - b).abs().max() for a, b in zip(found[1][1:], found[0][1:], strict=True))
    for i, (ours, right) in enumerate(zip(found[2], found[0], strict=True)):
        allowed = 4 * theirs + torch.finfo(dtype).eps * (largest if i else right)
        assert (ours - right).abs().max() <= allowed, f"{'a gradient' if i else 'the loss'} is off"


@pytest.mark.parametrize("device", devices())
def test_dropout_by_the_seed_and_in_a_captured_graph(device):
    """Masks come from torch's generator on the device, which a captured graph advances."""
    model, given = small_model(device, 0.2), small_batch(device)
    given.pop("attention_mask")
    sbk.patch(model, mlm_loss=False)

    def step() -> list[torch.Tensor]:
        return [model.bert(given["input_ids"]).last_hidden_state.detach()]

    torch.manual_seed(5)
    first = step()[0]
    torch.manual_seed(5)
    assert torch.equal(step()[0], first)
    outputs, replay = device.captured(step)
    replay()
    kept = outputs[0].clone()
    replay()
    assert torch.isfinite(kept).all() and not torch.equal(outputs[0], kept)
