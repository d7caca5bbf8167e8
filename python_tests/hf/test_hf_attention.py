"""The attention "stackbert" beside transformers' sdpa: padding of any kind, packed batches, compiled, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionMaskInterface, BertConfig, BertForMaskedLM, BertLMHeadModel

import stackbert_kernels as sbk

COLUMNS, ROWS = 12, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 through three layers whose values are about 1, sums in another order


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    sbk.hf.register()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, vocab_size=99,
        max_position_embeddings=16, initializer_range=0.1, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM._from_config(config, attn_implementation="stackbert").eval()


IDS = torch.randint(5, 99, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))


def mask(padding: str) -> torch.Tensor | None:
    if padding == "none":
        return None
    if padding == "holes":
        return (
            (torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.6)
            .long()
            .index_fill(1, torch.tensor([4]), 1)
        )
    lengths = torch.tensor([COLUMNS] * ROWS if padding == "full" else [COLUMNS, 1, 5, 7])
    made = (torch.arange(COLUMNS) < lengths[:, None]).long()
    return made.flip(1) if padding == "left" else made


def with_sdpa(model, *args, **kwargs) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    try:
        return model(*args, **kwargs).logits
    finally:
        model.set_attn_implementation("stackbert")


@pytest.mark.parametrize("padding", ["none", "full", "right", "left", "holes"])
def test_as_sdpa(model, padding):
    """Gradients too: those of what stands at tokens."""
    keep = mask(padding)
    at = torch.ones_like(IDS, dtype=torch.bool) if keep is None else keep == 1
    gradients = []
    for logits in (with_sdpa(model, IDS, attention_mask=keep), model(IDS, attention_mask=keep).logits):
        model.zero_grad()
        logits[at].square().mean().backward()
        gradients.append((logits[at], *(p.grad.clone() for p in model.parameters())))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_packed_sequences(model):
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    ours = model(IDS[:1], position_ids=positions, **packed).logits
    alone = torch.cat([with_sdpa(model, IDS[:1, :5]), with_sdpa(model, IDS[:1, 5:])], 1)
    torch.testing.assert_close(ours, alone, **CLOSE)
    with pytest.raises(ValueError, match=r"must be \[1, T\], got 4 rows"):
        model(IDS, **packed)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiled_without_a_break(model, padding):
    torch.compiler.reset()
    keep = mask(padding)
    at = torch.ones_like(IDS, dtype=torch.bool) if keep is None else keep == 1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(IDS, attention_mask=keep).logits[at], model(IDS, attention_mask=keep).logits[at], **CLOSE
    )


def test_the_seed_decides(model):
    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(IDS, attention_mask=mask("right")).logits

    model.train()
    try:
        assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    finally:
        model.eval()


def test_without_its_mask_function_it_refuses(model, monkeypatch):
    """transformers would give every layer None for a mask and attend to the padding."""
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "stackbert")
    with pytest.raises(ValueError, match=r"no mask function came with it.*call sbk\.hf\.register\(\)"):
        model(IDS, attention_mask=mask("right"))


def test_what_it_does_not_do(model):
    square = torch.ones(ROWS, 1, COLUMNS, COLUMNS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"wanted a padding mask \[B, S\], got \[4, 1, 12, 12\]"):
        model(IDS, attention_mask=square)
    decoder = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=99, is_decoder=True
    )
    with pytest.raises(ValueError, match="wanted a padding mask in both directions, got causal"):
        BertLMHeadModel._from_config(decoder, attn_implementation="stackbert")(IDS)
