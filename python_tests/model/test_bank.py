"""LayerBank: parameters stay views of one tensor, and gradients of another, whatever is done to the module."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model import Bert, LayerBank


def small_bank(layers: int = 3) -> LayerBank:
    bank = LayerBank(layers, {"a": (3, 5), "b": (4, 4)}, {"bias": (7,), "norm1_weight": (5,)})
    for i in range(layers):
        bank.initialise(i, seed=0, std=1.0)
    return bank


def assert_whole(bank: LayerBank) -> None:
    """Every parameter is a leaf and a view of its row; inside the window its .grad is a view of the gradient's row."""
    first, last = bank.window
    assert bank.grads.shape == bank.weights.shape
    for i, layer in enumerate(bank.layers):
        for slot in bank.layout:
            parameter = getattr(layer, slot.name)
            inside = first <= i < last
            assert isinstance(parameter, torch.nn.Parameter) and parameter.is_leaf and parameter.shape == slot.shape
            assert parameter.requires_grad == inside
            assert (parameter.dtype, parameter.device) == (bank.weights.dtype, bank.weights.device)
            assert parameter.data_ptr() == bank.weights[i, slot.offset :].data_ptr()
            if inside:
                assert parameter.grad.data_ptr() == bank.grads[i, slot.offset :].data_ptr()
            else:
                assert parameter.grad is None


def test_layout_is_matrices_first_and_aligned():
    bank = small_bank()
    assert [(slot.name, slot.offset) for slot in bank.layout] == [
        ("a", 0),
        ("b", 16),
        ("bias", 32),
        ("norm1_weight", 48),
    ]
    assert bank.decay_size == 32 and bank.weights.shape == (3, 64)
    assert_whole(bank)


def test_initial_values():
    bank = small_bank()
    layer = bank.layers[1]
    assert layer.bias.eq(0).all() and layer.norm1_weight.eq(1).all() and layer.a.std() > 0.3
    owned = torch.zeros(64, dtype=torch.bool)
    for slot in bank.layout:
        owned[slot.offset : slot.offset + slot.size] = True
    assert bank.weights[:, ~owned].eq(0).all()
    assert not torch.equal(bank.weights[0], bank.weights[1])


def test_a_layers_initial_weights_do_not_depend_on_the_depth():
    shallow, deep = tiny(layers=2), tiny(layers=5)
    norms = shallow.bank.decay_size  # tiny() randomises the rest
    assert torch.equal(shallow.bank.weights[:, :norms], deep.bank.weights[:2, :norms])
    assert torch.equal(shallow.word, deep.word)
    assert not torch.equal(shallow.word, tiny(seed=1).word)


@pytest.mark.parametrize("window", [(0, 3), (1, 2)])
@pytest.mark.parametrize("how", ["to", "deepcopy", "pickle", "load", "assign"])
def test_views_survive(how, window):
    bank = small_bank()
    bank.set_window(*window)
    bank.grads[window[0] : window[1]].normal_()
    before, grads = bank.weights.clone(), bank.grads.clone()
    if how == "to":
        bank.to(torch.float64).to("cpu")
        assert bank.weights.dtype == bank.grads.dtype == torch.float64
    elif how == "deepcopy":
        old, bank = bank, copy.deepcopy(bank)
        old.weights.zero_()
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(bank, file)
        file.seek(0)
        bank = torch.load(file, weights_only=False)
    else:
        state = copy.deepcopy(bank.state_dict())
        bank.weights.zero_()
        bank.load_state_dict(state, assign=how == "assign")
    assert_whole(bank)
    assert torch.equal(bank.weights.float(), before) and torch.equal(bank.grads.float(), grads)
    with torch.no_grad():
        bank.weights[1].fill_(3)
    assert bank.layers[1].a.eq(3).all()


def test_state_dict_has_a_name_for_every_parameter_and_nothing_else():
    names = [f"layers.{i}.{name}" for i in range(3) for name in ("a", "b", "bias", "norm1_weight")]
    assert list(small_bank().state_dict()) == names == [name for name, _ in small_bank().named_parameters()]


def test_gradients_accumulate_in_the_bank():
    model, rng = tiny(), ops.new_rng(0)
    for expected in (1, 2):
        model(batch(), rng=rng).loss.backward()
        assert_whole(model.bank)
        if expected == 1:
            once = model.bank.grads.clone()
    torch.testing.assert_close(model.bank.grads, 2 * once)
    model.zero_grad()
    assert model.bank.grads.eq(0).all() and model.word.grad is None
    assert_whole(model.bank)


def test_an_ordinary_optimizer_works():
    """zero_grad(set_to_none=True) takes the views away; the next forward puts them back, zeroed."""
    model, rng = tiny(), ops.new_rng(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(batch(), rng=rng).loss.backward()
    once = model.bank.grads.clone()
    optimizer.step()
    optimizer.zero_grad()
    assert model.bank.layers[0].qkv_weight.grad is None
    model(batch(), rng=rng).loss.backward()
    assert_whole(model.bank)
    assert torch.equal(model.bank.grads, once)


def test_a_copied_model_is_independent():
    model = tiny()
    other = copy.deepcopy(model)
    assert_whole(other.bank)
    rng = ops.new_rng(3)
    assert torch.equal(model(batch(), rng=rng).loss, other(batch(), rng=rng).loss)
    other(batch(), rng=rng).loss.backward()
    assert model.bank.grads.eq(0).all() and other.bank.grads.ne(0).any()


def test_window_outside_the_bank():
    with pytest.raises(ValueError, match=r"the window must lie in \[0, 3\], got \[2, 4\)"):
        small_bank().set_window(2, 4)


@pytest.mark.parametrize(
    ("config", "layer", "embeddings", "mlm", "pair", "total"),
    [
        (ModelConfig(vocab_size=30522, objective="mlm+nsp"), 7_087_872, 23_837_184, 622_650, 592_130, 110_106_428),
        (
            ModelConfig(layers=24, hidden=1024, heads=16, vocab_size=30522, objective="mlm+nsp"),
            *(12_596_224, 31_782_912, 1_082_170, 1_051_650, 336_226_108),
        ),
    ],
    ids=["base", "large"],
)
def test_parameter_counts(config, layer, embeddings, mlm, pair, total):
    """BERT-base and -large: the table of specs/common.md, section 3."""
    sizes = {name: p.numel() for name, p in Bert(config, device="meta").named_parameters()}

    def count(*prefixes: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefixes))

    assert count("bank.layers.0.") == layer
    assert count("word", "position", "token_type", "embedding_norm") == embeddings
    assert (count("mlm."), count("pair."), count("")) == (mlm, pair, total)
