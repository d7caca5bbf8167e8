"""Training patched models: the same losses without dropout, the same distribution with it, the same masks from the same seed."""

from __future__ import annotations

import patch_samples as samples
import pytest
import torch
from torch import nn

import stackbert_kernels as sbk


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpad"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_the_same_losses_for_200_steps(name, unpad):
    model = samples.model(
        name, num_hidden_layers=1, hidden_size=32, num_attention_heads=2, initializer_range=0.02
    ).train()
    patched = samples.twin(model)
    sbk.patch(patched, unpad=unpad)
    optimizers = [torch.optim.AdamW(made.parameters(), lr=1e-4) for made in (model, patched)]
    batches = [samples.batch(name, padding, seed) for seed in range(4) for padding in samples.PADDING]
    for step in range(200):
        losses = []
        for made, optimizer in zip((model, patched), optimizers, strict=True):
            loss = made(**batches[step % len(batches)]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), f"step {step}"
    assert losses[0] < 4.5


def draws(made: nn.Module, ids: torch.Tensor, times: int) -> torch.Tensor:
    """Rows of a batch have masks of their own."""
    with torch.no_grad():
        return made(ids.expand(times, -1)).last_hidden_state


def test_dropout_has_the_same_mean_and_variance():
    """2,000 draws. Their mean has an error of one standard deviation over sqrt(2,000), their variance of sqrt(2 / 2,000) = 3%; the ops
    drop 26 of 256, not 25.6, which is 2% of the variance. Four such errors are allowed, averaged values less."""
    model = samples.model("BertModel", p=0.1, num_hidden_layers=1, num_attention_heads=2, hidden_size=32).train()
    patched = samples.twin(model)
    sbk.patch(patched)
    ids = samples.batch("BertModel", "none")["input_ids"][:1]
    ours, theirs = draws(patched, ids, 2000), draws(model, ids, 2000)
    spread = (ours.std(0) ** 2 + theirs.std(0) ** 2).sqrt() / 2000**0.5
    z = ((ours.mean(0) - theirs.mean(0)) / spread).abs()
    assert z.max() < 5 and z.mean() < 1.0  # of 352 standard normal values the mean size is 0.8
    ratio = ours.var(0).mean() / theirs.var(0).mean()
    assert 0.92 < ratio < 1.12, f"variance {ratio:.3f} of the unpatched model's"


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpad"])
def test_the_seed_decides(unpad):
    name = "BertForMaskedLM"
    patched = samples.model(name, p=0.1).train()
    sbk.patch(patched, unpad=unpad)
    given = samples.batch(name, "right")

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return patched(**given).loss

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    patched.eval()
    assert torch.equal(loss(1), loss(2))


def test_dropout_is_that_of_the_modules_now():
    patched = samples.model("BertModel", p=0.5, num_hidden_layers=1).train()
    sbk.patch(patched)
    given = samples.batch("BertModel", "none")

    def varies() -> bool:
        return not torch.equal(patched(**given)[0], patched(**given)[0])

    assert varies()
    for module in patched.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not varies()
    patched.encoder.layer[0].output.dropout.p = 0.3
    assert varies()
    patched.encoder.layer[0].output.dropout = nn.Identity()
    assert not varies()
    patched.embeddings.dropout.p = 1.0  # more than the op takes
    assert not varies() and torch.isfinite(patched(**given)[0]).all()
    patched.embeddings.dropout.p = 0.001  # less than it can do
    patched.train()
    assert torch.isfinite(patched(**given)[0]).all()


def test_frozen_tables_get_no_gradient():
    patched = samples.model("BertModel").train()
    sbk.patch(patched)
    for parameter in patched.embeddings.parameters():
        parameter.requires_grad_(False)
    patched(**samples.batch("BertModel", "right"))[0].sum().backward()
    assert all(p.grad is None for p in patched.embeddings.parameters())
    assert patched.encoder.layer[0].output.dense.weight.grad is not None


def bfloat16_losses(seed: int, patched: bool) -> torch.Tensor:
    """200 steps under autocast; the seed decides the weights, the dropout and the order of the batches."""
    name = "BertForSequenceClassification"
    model = samples.model(name, p=0.1, seed=seed, num_hidden_layers=1, hidden_size=32, num_attention_heads=2).train()
    if patched:
        sbk.patch(model, unpad=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    losses = []
    for step in range(200):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**samples.batch(name, "right", (step + 7 * seed) % 5)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).view(20, 10).mean(1)


def test_bfloat16_learns_within_the_spread_of_two_seeds():
    one, other, ours = bfloat16_losses(1, False), bfloat16_losses(2, False), bfloat16_losses(1, True)
    assert one[-1] < 0.7 * one[0]
    assert (ours - one).abs().mean() < (other - one).abs().mean()
