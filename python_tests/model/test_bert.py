"""The encoder, its active window and its losses, against plain PyTorch and against itself."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from samples import batch, tiny
from torch import Tensor
from torch.nn import functional as F

from stackbert_kernels import ops
from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model import Bert

DEPTH = 4
WINDOW = 2  # train_from in most tests


def loss_of(model: Bert, data=None, step: int = 0):
    return model(data or batch(), rng=ops.new_rng(7, step)).loss


def gradients(model: Bert, data=None) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, data).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_losses(model: Bert, data) -> tuple[Tensor, Tensor | None]:
    """What the model computes without dropout, written sequence by sequence in plain PyTorch."""
    c, P = model.config, dict(model.named_parameters())

    def norm(x, name):
        weight, bias = (
            P[f"{name}{end}"] for end in (("_weight", "_bias") if name.startswith("bank") else (".weight", ".bias"))
        )
        return F.layer_norm(x, (c.hidden,), weight, bias, c.norm_eps)

    def gelu(x):
        return F.gelu(x, approximate="tanh" if c.activation == "gelu_tanh" else "none")

    hidden = []
    bounds = data.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        ids, types, places = (t[start:end] for t in (data.input_ids, data.token_types, data.positions))
        x = norm(P["word"][ids] + P["position"][places] + P["token_type"][types], "embedding_norm")
        for i in range(model.depth):
            at = f"bank.layers.{i}."
            y = norm(x, at + "norm1") if c.norm == "pre" else x
            q, k, v = (
                F.linear(y, P[at + "qkv_weight"], P[at + "qkv_bias"])
                .view(-1, 3, c.heads, c.head_dim)
                .permute(1, 2, 0, 3)
            )
            y = ((q @ k.transpose(1, 2) / c.head_dim**0.5).softmax(-1) @ v).transpose(0, 1).reshape(-1, c.hidden)
            y = x + F.linear(y, P[at + "out_weight"], P[at + "out_bias"])
            x = y if c.norm == "pre" else norm(y, at + "norm1")
            y = norm(x, at + "norm2") if c.norm == "pre" else x
            y = F.linear(
                gelu(F.linear(y, P[at + "inner_weight"], P[at + "inner_bias"])),
                P[at + "outer_weight"],
                P[at + "outer_bias"],
            )
            x = x + y if c.norm == "pre" else norm(x + y, at + "norm2")
        hidden.append(norm(x, "final_norm") if c.norm == "pre" else x)
    firsts = torch.stack([h[0] for h in hidden])
    x = torch.cat(hidden)[data.masked]
    x = norm(gelu(F.linear(x, P["mlm.transform.weight"], P["mlm.transform.bias"])), "mlm.norm")
    mlm = F.cross_entropy(F.linear(x, P["word"], P["mlm.bias"]), data.labels)
    if data.pair_labels is None:
        return mlm, None
    pooled = torch.tanh(F.linear(firsts, P["pair.pooler.weight"], P["pair.pooler.bias"]))
    return mlm, F.cross_entropy(
        F.linear(pooled, P["pair.classifier.weight"], P["pair.classifier.bias"]), data.pair_labels
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("pair", [False, True])
def test_losses_and_gradients_match_plain_pytorch_in_float64(norm, activation, pair):
    model = tiny(norm=norm, activation=activation, objective="mlm+nsp" if pair else "mlm", dropout=0.0).double()
    model.impl = "reference"
    data = batch(pair=pair)
    output = model(data)
    mlm, pair_loss = plain_losses(model, data)
    torch.testing.assert_close(output.mlm_loss, mlm)
    total = mlm + pair_loss if pair else mlm
    torch.testing.assert_close(output.loss, total)
    expected = dict(
        zip(
            (names := [n for n, _ in model.named_parameters()]),
            torch.autograd.grad(total, list(model.parameters())),
            strict=True,
        )
    )
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert len(names) == len(expected)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_float32_is_close_to_float64(norm):
    model, data = tiny(norm=norm, objective="mlm+sop", dropout=0.0), batch(pair=True)
    wide = tiny(norm=norm, objective="mlm+sop", dropout=0.0).double()
    wide.impl = "reference"
    narrow, exact = gradients(model, data), gradients(wide, data)
    torch.testing.assert_close(loss_of(model, data).double(), loss_of(wide, data), rtol=1e-5, atol=1e-5)
    for name, gradient in narrow.items():  # a few hundred roundings of 6e-8 each, relative to the largest entry
        assert (gradient - exact[name]).abs().max() <= 1e-4 * exact[name].abs().max(), name


@pytest.mark.parametrize("train_from", [1, 2, 3])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_window_gradients_are_those_of_a_full_backward(norm, train_from):
    model = tiny(norm=norm, objective="mlm+nsp")
    data = batch(pair=True)
    full = gradients(model, data)
    model.use(DEPTH, train_from, "freeze")
    window = gradients(model, data)
    assert {int(name.split(".")[2]) for name in window if name.startswith("bank.")} == set(range(train_from, DEPTH))
    assert "word" not in window and "embedding_norm.weight" not in window
    for name, gradient in window.items():
        torch.testing.assert_close(gradient, full[name], rtol=0, atol=1e-6)


def test_frozen_layers_have_no_gradient_and_do_not_move():
    model = tiny()
    model.use(3, 1, "freeze")
    before = model.bank.weights.clone()
    embeddings = [p.clone() for p in (model.word, model.position, model.token_type, model.embedding_norm.weight)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        loss_of(model, step=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model).backward()
    assert model.bank.grads[[0, 3]].eq(0).all() and model.bank.grads[1:3].ne(0).any()
    assert torch.equal(model.bank.weights[[0, 3]], before[[0, 3]])
    assert not torch.equal(model.bank.weights[1:3], before[1:3])
    for parameter, old in zip(
        (model.word, model.position, model.token_type, model.embedding_norm.weight), embeddings, strict=True
    ):
        assert torch.equal(parameter, old)


def saved(model: Bert, data) -> list[Tensor]:
    """All tensors that a step keeps for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, data).backward()
    return kept


@pytest.mark.parametrize("embeddings", ["freeze", "output_grad", "untie"])
def test_nothing_is_saved_below_the_window(embeddings):
    """As many tensors and bytes as a shallower model with as many trained layers, and none of a frozen layer's weights."""
    model, data = tiny(), batch()
    sizes = []
    for depth, train_from in ((2, 1), (4, 3)):
        model.use(depth, train_from, embeddings)
        kept = saved(model, data)
        sizes.append((len(kept), sum(t.numel() * t.element_size() for t in kept)))
        row = model.bank.weights[0].nbytes
        start = model.bank.weights.data_ptr()
        assert not any(start <= t.data_ptr() < start + train_from * row for t in kept)
    assert sizes[0] == sizes[1]
    model.use(4, 0)
    assert len(saved(model, data)) > 2 * sizes[1][0]


def test_embeddings_train():
    model = tiny()
    assert all(p.requires_grad for p in model.parameters())
    names = set(gradients(model))
    assert {"word", "position", "token_type", "embedding_norm.weight", "embedding_norm.bias"} <= names


def test_embeddings_freeze():
    model = tiny()
    model.use(DEPTH, WINDOW, "freeze")
    names = set(gradients(model))
    assert not names & {"word", "position", "token_type", "embedding_norm.weight", "embedding_norm.bias"}
    assert {"mlm.transform.weight", "mlm.bias", "mlm.norm.weight"} <= names


def test_embeddings_output_grad_is_the_decoders_part():
    model = tiny()
    model.use(DEPTH, WINDOW, "output_grad")
    output = gradients(model)
    assert "position" not in output
    model.use(DEPTH, WINDOW, "untie")  # the private copy sees exactly the decoder's gradient
    untied = gradients(model)
    assert "word" not in untied
    assert torch.equal(output["word"], untied["mlm.decoder"])
    model.use(DEPTH, 0)
    assert not torch.allclose(gradients(model)["word"], output["word"])


def test_embeddings_output_grad_knows_how_far_the_word_embedding_has_gone():
    model = tiny()
    assert model.word_drift() is None
    model.use(DEPTH, WINDOW, "output_grad")
    before = model.word.detach().double()
    assert model.word_drift() == 0 and "word_before" not in model.state_dict()
    loss_of(model).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.use(DEPTH, WINDOW + 1, "output_grad")  # the next stage counts from the same point
    exact = (model.word.detach().double() - before).norm() / before.norm()
    assert exact > 1e-4 and model.word_drift() == pytest.approx(float(exact), rel=1e-4)
    model.use(DEPTH, 0)
    assert model.word_drift() is None


def test_embeddings_untie_and_tie_again():
    model = tiny()
    before = model.word.clone()
    model.use(DEPTH, WINDOW, "untie")
    assert torch.equal(model.decoder, before) and model.decoder.data_ptr() != model.word.data_ptr()
    assert "mlm.decoder" in model.always_on_parameters() and "mlm.decoder" in model.state_dict()
    loss_of(model).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    learned = model.mlm.decoder.detach().clone()
    assert torch.equal(model.word, before) and not torch.equal(learned, before)
    model.use(DEPTH, WINDOW + 1, "untie")  # the next stage goes on with the same copy
    assert torch.equal(model.decoder, learned)
    model.use(DEPTH, 0, "train")
    assert model.decoder is model.word and torch.equal(model.word, learned)
    assert "mlm.decoder" not in model.state_dict()


def test_embeddings_full_is_the_whole_gradient_with_frozen_layers():
    model = tiny()
    whole = gradients(model)
    model.use(DEPTH, WINDOW, "full")
    full = gradients(model)
    assert not any(name.startswith(("bank.layers.0.", "bank.layers.1.")) for name in full)
    assert model.bank.grads[:WINDOW].eq(0).all()
    for name, gradient in full.items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6)
    assert {"word", "position", "token_type"} <= set(full)


def test_frozen_dropout_off():
    """With dropout only above the window, the frozen part's output is that of eval; with it on, it is not."""
    model, data = tiny(dropout=0.0, attention_dropout=0.3), batch()

    def input_of_the_window(frozen_dropout: bool) -> Tensor:
        model.use(DEPTH, WINDOW, "freeze", frozen_dropout)
        seen = []
        layer = model._layer
        model._layer = lambda i, x, *rest: (seen.append(x), layer(i, x, *rest))[1]
        model.encode(data, rng=ops.new_rng(0))
        del model._layer
        return seen[WINDOW]

    off, on = input_of_the_window(False), input_of_the_window(True)
    model.use(WINDOW)
    exact = model.eval().encode(data)
    assert torch.equal(off, exact) and not torch.allclose(on, exact)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_last_layer_at_some_rows_is_exact(norm):
    model = tiny(norm=norm).eval()
    data = batch()
    rows = torch.tensor([3, 0, 17, 9])
    torch.testing.assert_close(model.encode(data, rows=rows), model.encode(data)[rows], rtol=1e-5, atol=1e-5)


def test_depth_in_use_ignores_the_layers_above():
    model, data = tiny().eval(), batch()
    model.use(2)
    before = model.encode(data)
    with torch.no_grad():
        model.bank.weights[2:].fill_(float("nan"))
    assert torch.equal(model.encode(data), before)


def test_dropout_depends_on_rng_alone():
    model = tiny()
    first, again, other = loss_of(model, step=0), loss_of(model, step=0), loss_of(model, step=1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(model.eval()(batch()).loss, model(batch(), rng=ops.new_rng(1)).loss)


def test_sites_are_unique(monkeypatch):
    """Two places with one site would draw the same mask."""
    model, sites = tiny(), []
    for name in ("attention_qkv_varlen", "dropout_add_layer_norm", "embedding_layer_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, **k: (sites.append(k["site"]), op(*a, **k))[1])
    loss_of(model)
    assert len(sites) == len(set(sites)) == 1 + 3 * DEPTH


@pytest.mark.parametrize("window", [(4, 0, "train"), (4, 2, "freeze")])
def test_bfloat16_autocast(window):
    model = tiny(init_std=0.1, dropout=0.0)
    model.use(*window)
    exact = gradients(model)
    loss = loss_of(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch())
        hidden = model.encode(batch())
    output.loss.backward()
    assert hidden.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, loss, rtol=0.02, atol=0.02)  # 8 bits of mantissa through four layers
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            similarity = F.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0)
            assert similarity > 0.98, f"{name}: {similarity}"


def test_evaluate_counts_what_the_loss_averages():
    model, data = tiny(), batch()
    total, correct, count = model.evaluate(data)
    assert model.training
    assert count == len(data.masked)
    torch.testing.assert_close((total / count).float(), model.eval()(data).loss)
    hidden = model.mlm.features(model.encode(data)[data.masked], "auto")
    assert correct == (F.linear(hidden, model.word, model.mlm.bias).argmax(1) == data.labels).sum()


def test_sequences_without_tokens_change_nothing():
    model = tiny(dropout=0.0)
    data, gaps = batch((5, 7)), batch((0, 5, 0, 0, 7, 0))
    assert torch.equal(data.input_ids, gaps.input_ids)
    torch.testing.assert_close(loss_of(model, gaps), loss_of(model, data))


def test_no_predicted_token_gives_loss_zero():
    model, data = tiny(), batch()
    data = dataclasses.replace(data, masked=data.masked[:0], labels=data.labels[:0])
    loss = loss_of(model, data)
    loss.backward()
    assert loss == 0 and model.bank.grads.eq(0).all()


def test_bad_arguments():
    data = batch()
    with pytest.raises(ValueError, match=r"vocab_size must be > 0"):
        Bert(ModelConfig(layers=1, hidden=8, heads=1))
    with pytest.raises(ValueError, match=r"max_position 16, got one of 24 tokens"):
        loss_of(tiny(max_position=16))
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 50\), got \d+"):
        loss_of(tiny(vocab_size=50))
    with pytest.raises(ValueError, match=r"token_types must be in \[0, 1\), got 1"):
        loss_of(tiny(token_types=1))
    with pytest.raises(ValueError, match=r"positions must be \[T\], got \[47\] and \[46\]"):
        loss_of(tiny(), dataclasses.replace(data, positions=data.positions[1:]))
    with pytest.raises(ValueError, match=r"labels must be \[15\] to match masked, got \[14\]"):
        loss_of(tiny(), dataclasses.replace(data, labels=data.labels[1:]))
    with pytest.raises(ValueError, match="rng must be given in training with dropout"):
        tiny()(data)
    with pytest.raises(ValueError, match="either a batch or input_ids=, got neither"):
        tiny()()
    model = tiny()
    for use, message in (
        ((5,), r"depth <= 4, got train_from 0, depth 5"),
        ((3, 3, "freeze"), r"train_from < depth <= 4, got train_from 3, depth 3"),
        ((3, 1), r"embeddings cannot be 'train' where train_from is 1"),
        ((3, 1, "tie"), r"must be one of train, freeze, .* got 'tie'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.use(*use)
