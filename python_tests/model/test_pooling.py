"""Pooled embeddings: values and gradients against loops in float64, and what the model makes of a pooled stream."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from samples import batch, tiny
from torch.utils.flop_counter import FlopCounterMode

from stackbert_kernels import ops
from stackbert_kernels.config import DataConfig, ModelConfig, Stage, TrainConfig
from stackbert_kernels.data.windows import windows
from stackbert_kernels.model import Bert
from stackbert_kernels.model.pooling import pool
from stackbert_kernels.plan import flops_per_token, pooled_length

LENGTHS = (9, 1, 24, 13)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pooled(plain, size: int, kind: str = "mean"):
    return replace(plain, windows=windows(plain.cu_seqlens, plain.masked, size, kind))


def exact(kind: str, size: int, **changes) -> Bert:
    model = tiny(**({"dropout": 0.0} | changes)).double().eval()
    model.impl = "reference"
    return model


def by_loop(x: torch.Tensor, w) -> torch.Tensor:
    result = []
    for row, count in enumerate(w.counts.tolist()):
        tokens = x[w.sources[:count, row]]
        result.append(tokens.mean(0) if w.kind == "mean" else tokens.amax(0))
    return torch.stack(result)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_values_and_gradients(kind, size):
    plain = batch(LENGTHS)
    w = windows(plain.cu_seqlens, plain.masked, size, kind)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, generator=generator, requires_grad=True)
    y, wanted = pool(x, w), by_loop(x, w)
    torch.testing.assert_close(y, wanted, rtol=1e-15, atol=1e-15)
    alone = w.counts == 1
    assert torch.equal(y[alone], x[w.sources[0, alone]])  # [CLS], the predicted ones, and what is left at an end
    assert alone[w.cu_seqlens[:-1].long()].all() and alone[w.masked].all()
    dy = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (dx,) = torch.autograd.grad(y, x, dy)
    (wanted,) = torch.autograd.grad(by_loop(x, w), x, dy)
    torch.testing.assert_close(dx, wanted, rtol=1e-15, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: pool(x, w), (x,))


def test_of_equal_values_the_first_learns():
    w = windows(torch.tensor([0, 4], dtype=torch.int32), torch.zeros(0, dtype=torch.int64), 3, "max")
    x = torch.zeros(4, 2, requires_grad=True)
    pool(x, w).sum().backward()
    assert x.grad.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_in_bfloat16_sums_are_wider(kind):
    plain = batch((33,))
    w = windows(plain.cu_seqlens, plain.masked, 8, kind)
    x = torch.randn(33, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = pool(x, w)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_loop(x.double(), w).float().bfloat16() if kind == "mean" else by_loop(x, w))


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_windows_of_one_token_are_the_identity(kind, objective):
    """The stream has another order, which attention does not see: losses and gradients are those of the plain batch."""
    model = exact(kind, 1, objective=objective)
    plain = batch(LENGTHS, pair=objective != "mlm")
    losses, gradients = [], []
    for given in (plain, pooled(plain, 1, kind)):
        model.zero_grad()
        output = model(given)
        output.loss.backward()
        losses.append([loss.item() for loss in (output.mlm_loss, output.pair_loss) if loss is not None])
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_a_pooled_batch_is_its_sequences_alone(kind):
    model = exact(kind, 3, norm="pre", embedding=16)
    plain, total = batch(LENGTHS), 0.0
    first = plain.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(first):
        inside = (plain.masked >= begin) & (plain.masked < end)
        if not inside.any():
            continue
        one = replace(
            plain, input_ids=plain.input_ids[begin:end], token_types=plain.token_types[begin:end], positions=plain.positions[begin:end],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32), max_seqlen=end - begin,
            masked=plain.masked[inside] - begin, labels=plain.labels[inside],
        )  # fmt: skip
        total += model(pooled(one, 3, kind)).mlm_loss.item() * int(inside.sum())
    whole = model(pooled(plain, 3, kind)).mlm_loss.item()
    assert whole == pytest.approx(total / len(plain.masked), rel=1e-12)
    assert whole != pytest.approx(model(plain).mlm_loss.item(), rel=1e-3)


def test_evaluates_a_pooled_batch_as_it_trains_on_it():
    model, given = exact("mean", 2), pooled(batch(LENGTHS), 2)
    loss, _, count = model.evaluate(given)
    assert loss.item() / int(count) == pytest.approx(
        model(given).mlm_loss.item(), rel=1e-6
    )  # sums of losses are float32


B, S, V = 4, 16, 96


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("embedding", [0, 8])
def test_matrix_products_are_those_of_the_plan(embedding, objective, size):
    """As in test_flops.py, with narrow feed-forward layers and pooled tokens: of 16 tokens 4 are predicted, the encoder has 1 + ceil(11 / p) + 4."""
    whole = ModelConfig(
        layers=4, hidden=32, heads=2, vocab_size=V, max_position=S, objective=objective, embedding=embedding
    )
    masked = torch.arange(1, B * S, 4)
    plain = replace(batch((S,) * B, pair=objective != "mlm", vocab_size=V), masked=masked, labels=masked % V)
    given = pooled(plain, size) if size > 1 else plain
    model = Bert(replace(whole, inner=64))
    model.use(2)
    with FlopCounterMode(display=False) as counter:
        model(given, rng=ops.new_rng(1, 1)).loss.backward()
    config = TrainConfig(model=whole, data=DataConfig(seq_len=S, batch_tokens=B * S, mask_rate=0.25))
    length = pooled_length(S, 4, size)
    assert size == 1 or given.windows.max_seqlen == length == {2: 11, 5: 8}[size]
    attention = 12 * 2 * length * 32 * B * length
    decoder = 3 * 2 * whole.embedding_width * V * len(masked)
    wanted = flops_per_token(config, Stage(steps=1, depth=2, inner=64, pool=size)) * B * S
    assert counter.get_total_flops() == pytest.approx(wanted - attention - decoder, rel=1e-12)
