"""Growth of a model and its optimizer: rows and moments are exact copies, storages are not shared, the function is kept or nearly so."""

from __future__ import annotations

import pytest
import torch
from model.samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.config import ConfigError, OptimConfig, Stage
from stackbert_kernels.growth.apply import LAST_OF_BRANCH, grow
from stackbert_kernels.growth.depth import layer_map
from stackbert_kernels.train.optim import Optimizer

FIRST = Stage(steps=2, depth=2)


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are tiny: waking a second thread costs more than it does, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(steps: int = 2, **changes):
    """A model of which two of four layers have been trained, and its optimizer."""
    model = tiny(**changes)
    model.use(FIRST.depth)
    optimizer = Optimizer(model, OptimConfig(lr=1e-2))
    optimizer.set_window(FIRST)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(seed=step), rng=ops.new_rng(5, step)).loss.backward()
        optimizer.clip(1.0)
        optimizer.step(1e-2)


def stage(operator: str, depth: int = 4, **changes) -> Stage:
    return Stage(steps=1, depth=depth, train_from=2, grow=operator, embeddings="freeze", **changes)


def banks(model, optimizer) -> dict[str, torch.Tensor]:
    return {
        "weights": model.bank.weights,
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
        "steps": optimizer.steps,
    }


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def always_on(model, optimizer) -> dict[str, torch.Tensor]:
    state = {name: tensor for name, tensor in optimizer.state_dict().items() if not name.startswith("bank.")}
    return {f"weights {name}": p for name, p in model.always_on_parameters().items()} | state


@pytest.mark.parametrize("operator", ["copy_top", "stack", "interleave"])
def test_rows_and_moments_follow_the_map(operator):
    model, optimizer = trained()
    optimizer.steps[1] = 5  # rows differ in their counts too
    before, others = copies(banks(model, optimizer)), copies(always_on(model, optimizer))
    rows = grow(model, optimizer, stage(operator), seed=0)
    assert rows == layer_map(operator, 2, 4) and model.depth == 4
    for name, bank in banks(model, optimizer).items():
        for i, source in enumerate(rows):
            assert torch.equal(bank[i], before[name][source]), (name, i)
    for name, tensor in always_on(model, optimizer).items():
        assert torch.equal(tensor, others[name]), name


def test_copies_share_no_storage_and_part_by_their_gradients():
    model, optimizer = trained()
    grow(model, optimizer, stage("copy_top"), seed=0)
    model.use(4)
    optimizer.set_window(Stage(steps=1, depth=4))
    lower, upper = model.bank.layers[0], model.bank.layers[2]
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert torch.equal(lower.qkv_weight, upper.qkv_weight)
    train(model, optimizer, [7])
    assert not torch.equal(lower.qkv_weight, upper.qkv_weight) and not torch.equal(
        optimizer.exp_avg[0], optimizer.exp_avg[2]
    )


def test_rows_above_the_new_depth_are_left_alone():
    model, optimizer = trained()
    before = copies(banks(model, optimizer))
    grow(model, optimizer, stage("copy_top", depth=3), seed=0)
    for name, bank in banks(model, optimizer).items():
        assert torch.equal(bank[3], before[name][3]), name
        assert torch.equal(bank[2], before[name][1]), name


@pytest.mark.parametrize("operator", ["copy_top", "interleave", "random"])
def test_zero_clears_the_moments_of_changed_rows_alone(operator):
    model, optimizer = trained()
    before = copies(banks(model, optimizer))
    rows = grow(model, optimizer, stage(operator, optimizer_state="zero"), seed=0)
    for name, bank in list(banks(model, optimizer).items())[1:]:
        for i, source in enumerate(rows):
            assert torch.equal(bank[i], before[name][i]) if source == i else not bank[i].any(), (name, i)
    assert optimizer.always_on["word"].step == 2


def test_reset_clears_all_moments():
    model, optimizer = trained()
    weights = model.bank.weights.clone()
    grow(model, optimizer, stage("copy_top", optimizer_state="reset"), seed=0)
    assert torch.equal(model.bank.weights, weights[[0, 1, 0, 1]])
    assert not any(bank.any() for bank in list(banks(model, optimizer).values())[1:])
    assert optimizer.always_on["word"].step == 0 and not optimizer.always_on["word"].exp_avg.any()


@pytest.mark.parametrize("operator", ["random", "identity"])
def test_fresh_rows_depend_on_seed_and_layer_alone(operator):
    model, optimizer = trained()
    before = copies(banks(model, optimizer))
    model.bank.weights[2:] = 3.0  # what stood there does not matter
    optimizer.exp_avg[2:] = 3.0
    grow(model, optimizer, stage(operator), seed=11)
    other, _ = trained(steps=1)
    grow(other, None, stage(operator), seed=11)
    assert torch.equal(model.bank.weights[2:], other.bank.weights[2:])
    assert not torch.equal(model.bank.weights[2], model.bank.weights[3])
    for name, bank in banks(model, optimizer).items():
        assert torch.equal(bank[:2], before[name][:2]), name
        assert name == "weights" or not bank[2:].any(), name
    for slot in model.bank.layout:
        fresh = slot.view(model.bank.weights[2])
        if operator == "identity" and slot.name in LAST_OF_BRANCH:
            assert not fresh.any(), slot.name
        elif slot.offset < model.bank.decay_size:
            assert abs(fresh.std() / model.config.init_std - 1) < 0.1, slot.name

    third, _ = trained(steps=1)
    grow(third, None, stage(operator), seed=12)
    assert not torch.equal(third.bank.weights[2], other.bank.weights[2])


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(48).view(2, 24), return_logits=True).logits


def test_identity_keeps_the_function_of_a_pre_norm_model():
    model, optimizer = trained(norm="pre")
    before = logits(model)
    grow(model, optimizer, stage("identity"), seed=0)
    model.use(4)
    assert torch.equal(logits(model), before)


def test_stacking_a_post_norm_model_does_not_keep_its_function():
    model, optimizer = trained()
    before = logits(model)
    grow(model, optimizer, stage("stack"), seed=0)
    model.use(4)
    assert not torch.allclose(logits(model), before)


def test_mslt_stage_changes_nothing_below_its_window():
    """After growth, steps of the new window leave layers below it and the embeddings as they were, moments included."""
    model, optimizer = trained()
    grown = stage("copy_top")
    grow(model, optimizer, grown, seed=0)
    model.use(grown.depth, grown.train_from, grown.embeddings)
    optimizer.set_window(grown)
    before = copies(banks(model, optimizer) | always_on(model, optimizer))
    train(model, optimizer, range(2, 5))
    for name, bank in banks(model, optimizer).items():
        assert torch.equal(bank[:2], before[name][:2]) and not torch.equal(bank[2:], before[name][2:]), name
    for name, tensor in always_on(model, optimizer).items():
        embedding = name.removeprefix("weights ").startswith(("word", "position", "token_type", "embedding_norm"))
        assert torch.equal(tensor, before[name]) == (embedding or name == "skipped"), name


def test_a_grown_run_resumes_bit_for_bit():
    """State saved right after growth, loaded into a new model and optimizer: the next steps are the same."""
    model, optimizer = trained()
    grown = stage("copy_top")
    grow(model, optimizer, grown, seed=0)
    model.use(grown.depth, grown.train_from, grown.embeddings)
    optimizer.set_window(grown)
    weights, state = copies(dict(model.named_parameters())), copies(optimizer.state_dict())
    train(model, optimizer, range(2, 4))

    again = tiny(seed=9)
    again.use(grown.depth, grown.train_from, grown.embeddings)
    again_optimizer = Optimizer(again, OptimConfig(lr=1e-2))
    again_optimizer.set_window(grown)
    again.load_state_dict(weights)
    again_optimizer.load_state_dict(state)
    train(again, again_optimizer, range(2, 4))
    for name, tensor in (banks(model, optimizer) | always_on(model, optimizer)).items():
        assert torch.equal(tensor, (banks(again, again_optimizer) | always_on(again, again_optimizer))[name]), name


def test_refuses_what_the_operator_cannot_do():
    model, optimizer = trained()
    before = copies(banks(model, optimizer))
    with pytest.raises(ConfigError, match="random needs 0 < old depth < new depth, got 2 -> 2"):
        grow(model, optimizer, Stage(steps=1, depth=2, grow="random"), seed=0)
    assert all(torch.equal(bank, before[name]) for name, bank in banks(model, optimizer).items())
