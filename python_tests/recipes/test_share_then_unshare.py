"""specs/share_then_unshare.md: sharing is one layer with the mean gradient, unsharing changes no function, and a whole run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from model.samples import TINY, batch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after

from stackbert_kernels import ops
from stackbert_kernels.config import ConfigError, ModelConfig, OptimConfig, Stage, TrainConfig, Untying
from stackbert_kernels.growth.apply import grow
from stackbert_kernels.growth.share import gradient_cosines, part_layers, unshare
from stackbert_kernels.model import Bert, LayerBank
from stackbert_kernels.plan import bank_rows, flops_per_token, trainable_parameters
from stackbert_kernels.recipes import ShareThenUnshareOptions, share_then_unshare
from stackbert_kernels.train.optim import Optimizer

BASE = TrainConfig(steps=1000)


def test_stages():
    first, second = share_then_unshare(BASE).stages
    assert first == Stage(steps=100, depth=12, rows=(0,) * 12, shared_gradient="mean", name="shared weights")
    assert second == Stage(steps=900, depth=12, grow="unshare", name="own weights")
    two = share_then_unshare(BASE, ShareThenUnshareOptions(unit=3, shared=0.5, gradient="sum", rewarm=7)).stages
    assert two[0].rows == (0, 1, 2) * 4 and two[0].shared_gradient == "sum" and two[1].rewarm == 7


def test_the_price_of_a_step_is_the_same_and_the_parameters_are_not():
    config = share_then_unshare(replace(BASE, model=ModelConfig(vocab_size=30522)))
    first, second = config.stages
    assert flops_per_token(config, first) == flops_per_token(config, second)
    layer = 7_087_872  # of BERT-base, specs/common.md
    assert trainable_parameters(config, second) - trainable_parameters(config, first) == 11 * layer


def test_no_shared_steps_is_the_baseline_with_equal_layers():
    config = share_then_unshare(BASE, ShareThenUnshareOptions(shared=0.0))
    assert config.stages == (Stage(steps=1000, depth=12, name="own weights"),)
    assert config.model == replace(BASE.model, equal_init=True)
    model = Bert(ModelConfig(**TINY, equal_init=True))
    assert all(torch.equal(row, model.bank.weights[0]) for row in model.bank.weights)


REFUSED = [
    ({"shared": 1.0}, {}, "share_then_unshare: shared must be in [0, 1), got 1.0"),
    ({"unit": 0}, {}, "share_then_unshare: unit must be >= 1, got 0"),
    ({"rewarm": -1}, {}, "share_then_unshare: rewarm must be >= 0, got -1"),
    ({"gradient": "max"}, {}, "share_then_unshare: gradient must be one of sum, mean, got 'max'"),
    ({"unit": 5}, {}, "share_then_unshare: unit must divide layers and be fewer, got layers 12, unit 5; units that fit: 1, 2, 3, 4, 6"),
    ({"shared": 0.0, "unit": 2}, {}, "share_then_unshare: shared 0 begins with equal layers, which needs unit 1, got 2"),
    ({"until": "late"}, {}, "share_then_unshare: until must be one of fixed, adaptive, split, got 'late'"),
    ({"until": "adaptive", "rewarm": 5}, {}, "share_then_unshare: rewarm needs a known step: until must be fixed, got adaptive"),
    ({"until": "split", "unit": 2}, {}, "share_then_unshare: until split begins with one group, which needs unit 1, got 2"),
    ({"until": "split", "below": 2.0}, {}, "share_then_unshare: below must be in [-1, 1], got 2.0"),
    ({"every": -1, "until": "split"}, {}, "share_then_unshare: every must be >= 0, got -1"),
    ({}, {"steps": 3}, "share_then_unshare: steps must leave both stages (shared 0.1) at least 1, got steps 3"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(given, changes, message):
    with pytest.raises(ConfigError) as error:
        share_then_unshare(replace(BASE, stages=(), **changes), ShareThenUnshareOptions(**given))
    assert str(error.value) == message


STAGES_REFUSED = [
    ((Stage(steps=5, depth=6, rows=(0,) * 6), Stage(steps=5, depth=12, grow="stack")),
     "stages[1]: layers that share rows cannot grow from depth 6 to 12: unshare them in a stage before"),
    ((Stage(steps=5, depth=12, rows=(0,) * 12), Stage(steps=5, depth=12)),
     "stages[1]: rows change, which needs grow='unshare', got grow=None"),
    ((Stage(steps=5, depth=12), Stage(steps=5, depth=12, rows=(0,) * 12, grow="unshare")),
     "stages[1]: unshare cannot merge: row 0 would gather layers of rows"),
    ((Stage(steps=5, depth=12, rows=(0,) * 12, ffn_rows=tuple(range(12))), Stage(steps=5, depth=12, grow="unshare")),
     "stages[1]: unshare is of whole layers at one depth"),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "message"), STAGES_REFUSED, ids=[message for _, message in STAGES_REFUSED])
def test_stages_that_cannot_follow_each_other_are_refused(stages, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(steps=10, stages=stages)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": (0, 0)}, "rows must name, for each of 4 layers, one of the rows up to its own, got (0, 0)"),
        ({"rows": (0, 2, 2, 2)}, "rows must name, for each of 4 layers, one of the rows up to its own, got (0, 2, 2, 2)"),
        ({"rows": (0, 0, 2, 2)}, "rows must be numbered without a gap, got [0, 2]"),
        ({"rows": (0, 0, 0, 0), "train_from": 2, "embeddings": "freeze"}, "layers that share rows learn together: train_from must be 0"),
        ({"ffn_rows": (0, 0, 0, 0)}, "ffn_rows, shared_gradient and untie need rows, got none"),
        ({"untie": Untying(every=1)}, "ffn_rows, shared_gradient and untie need rows, got none"),
        ({"rows": (0,) * 4, "ffn_rows": (0, 1, 2, 3), "untie": Untying(every=1)}, "untie parts whole layers: not with ffn_rows"),
        ({"rows": (0, 1, 0, 1), "untie": Untying(every=1, split=True)}, "untie.split needs groups of layers that follow each other"),
        ({"rows": (0,) * 4, "ffn_rows": (0, 1, 2, 3), "shared_gradient": "mean"}, "shared_gradient 'mean' is of whole layers"),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError) as error:
        Stage(steps=1, depth=4, **given)
    assert str(error.value).startswith(message)


def test_maps_of_unsharing():
    assert unshare((0, 0, 0, 0), (0, 1, 2, 3)) == [0, 0, 0, 0]
    assert unshare((0, 1, 0, 1), (0, 1, 2, 3)) == [0, 1, 0, 1]
    assert unshare((0, 0, 1, 1), (0, 0, 1, 2)) == [0, 1, 1]


# Parting by the gradients


@pytest.mark.parametrize(
    ("readings", "parts_at"),
    [("L", None), ("LL", None), ("LLL", 2), ("LLHL", None), ("LLHLLL", 5), ("HHHHH", None)],
)
def test_all_layers_part_after_three_low_readings_in_a_row(readings, parts_at):
    """L: two of three cosines below 0.5. H: one of three, which is not more than half."""
    cosines, rows, low = {"L": (0.4, 0.9, -1.0), "H": (0.4, 0.6, 0.5)}, (0, 0, 0, 0), 0
    for i, reading in enumerate(readings):
        rows, low = part_layers(rows, cosines[reading], low, Untying(every=1))
        assert rows == ((0, 1, 2, 3) if i == parts_at else (0, 0, 0, 0))


def test_only_the_group_concerned_is_split():
    untie = Untying(every=1, split=True)
    assert part_layers((0, 0, 0, 0), (0.9, 0.9, 0.9), 0, untie) == ((0, 0, 0, 0), 0)
    assert part_layers((0, 0, 0, 0), (0.9, 0.4, 0.9), 0, untie) == ((0, 0, 1, 1), 0)
    assert part_layers((0, 0, 1, 1), (0.9, 0.1, 0.2), 0, untie) == (
        (0, 0, 1, 2),
        0,
    )  # between groups nothing is left to split
    assert part_layers((0, 0, 1, 2), (0.0, 0.9, 0.9), 0, untie) == ((0, 1, 2, 3), 0)


def test_stages_that_watch_their_gradients():
    (stage,) = share_then_unshare(BASE, ShareThenUnshareOptions(until="adaptive", optimizer_state="zero")).stages
    assert stage.untie == Untying(every=2) and stage.rows == (0,) * 12 and stage.optimizer_state == "zero"
    config = share_then_unshare(BASE, ShareThenUnshareOptions(until="split", every=7, below=0.2))
    assert config.stages[0].untie == Untying(7, 0.2, split=True) and bank_rows(config) == 12
    assert [step for step in range(30) if config.stages[0].untie.due(step)] == [0, 7, 14, 21, 28]


def test_cosines_are_those_of_separate_layers_and_nothing_else_changes():
    """Against a clone of separate equal layers, with dropout; weights, moments, rows and window are as they were."""
    stage = Stage(steps=9, depth=4, rows=(0, 0, 1, 1), shared_gradient="mean", untie=Untying(every=1))
    model, _ = equal_model(stage)
    with torch.no_grad():
        model.bank.weights[1] += 0.01
    clone, _ = equal_model(Stage(steps=9, depth=4))
    with torch.no_grad():
        clone.bank.weights[2:] += 0.01
    before = model.bank.weights.clone()
    cosines = gradient_cosines(model, lambda: backward(model, 0))
    backward(clone, 0)
    grads = clone.bank.grads.double()
    wanted = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.pairwise(grads)]
    assert cosines == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert torch.equal(model.bank.weights, before) and model.rows == (0, 0, 1, 1) and model.bank.window == (0, 2)
    assert not model.bank.grads.any() and all(p.grad is None for p in model.always_on_parameters().values())


# Gradients


ONE = Stage(steps=9, depth=4, rows=(0, 0, 0, 0), shared_gradient="mean")
OWN = Stage(steps=9, depth=4, grow="unshare")


def equal_model(stage: Stage, **changes) -> tuple[Bert, Optimizer]:
    model = Bert(ModelConfig(**(TINY | changes), equal_init=True))
    optimizer = Optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-3))
    model.use(stage.depth, rows=stage.rows, ffn_rows=stage.ffn_rows)
    optimizer.set_window(stage)
    return model, optimizer


def backward(model: Bert, step: int) -> None:
    model(batch(seed=step), rng=ops.new_rng(5, step)).loss.backward()


def test_the_gradient_of_a_shared_row_is_the_sum_over_its_layers():
    """Of an untied clone, with dropout: masks belong to the layer, not to the row. Sums of four float32 terms in another order."""
    shared, _ = equal_model(ONE)
    clone, _ = equal_model(Stage(steps=9, depth=4))
    for model in (shared, clone):
        backward(model, 0)
    wanted = clone.bank.grads.double().sum(0)
    torch.testing.assert_close(shared.bank.grads[0].double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())
    assert not shared.bank.grads[1:].any()
    for (name, p), (_, q) in zip(
        shared.always_on_parameters().items(), clone.always_on_parameters().items(), strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_sharing_is_separate_equal_layers_that_learn_from_their_mean_gradient():
    """Separate layers stay bitwise equal, and are the shared row up to the order of sums: 1e-6, unclipped, three steps. A large eps,
    for Adam's first steps are the gradients' signs where it is small, and a sign can hang on rounding."""
    shared, optimizer = equal_model(ONE)
    separate, others = equal_model(Stage(steps=9, depth=4))
    for step in range(3):
        for model, adam in ((shared, optimizer), (separate, others)):
            adam.zero_grad()
            backward(model, step)
        separate.bank.grads[:] = separate.bank.grads.mean(0)
        optimizer.step(1e-3), others.step(1e-3)
        assert all(torch.equal(row, separate.bank.weights[0]) for row in separate.bank.weights)
    torch.testing.assert_close(shared.bank.weights[0], separate.bank.weights[0], rtol=0, atol=1e-6)


def test_the_mean_is_taken_once_however_often_the_norm_is_asked_for():
    model, optimizer = equal_model(ONE)
    optimizer.zero_grad()
    backward(model, 0)
    whole = model.bank.grads[0].clone()
    norms = [float(optimizer.clip(1.0)) for _ in range(2)]
    assert torch.equal(model.bank.grads[0], whole / 4) and norms[0] == norms[1]


def test_unsharing_keeps_the_function_bitwise_and_parts_the_layers():
    model, optimizer = equal_model(ONE)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.clip(1.0)
        optimizer.step(1e-3)

    def logits():
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(48).view(2, 24), return_logits=True).logits

    before, moments = logits(), optimizer.exp_avg[0].clone()
    assert grow(model, optimizer, OWN, seed=0) == [0, 0, 0, 0]
    model.use(4)
    optimizer.set_window(OWN)
    assert torch.equal(logits(), before)
    assert all(torch.equal(row, moments) for row in optimizer.exp_avg) and optimizer.steps.tolist() == [3.0] * 4
    model.train()
    optimizer.zero_grad()
    backward(model, 3)
    assert all(not torch.equal(model.bank.grads[0], row) for row in model.bank.grads[1:])


def test_a_deep_linear_net_goes_to_its_target_faster_by_the_number_of_layers():
    """L = 8 layers of the bank, target 2 I, R = |W_8 ... W_1 - 2 I|^2 / 2: dR/dt(0) = -2 L R when all are I and share (mean gradient),
    -2 R when the last is zero and the others are I. float32, whose products of identities are exact."""
    L, d = 8, 5

    def rate(rows, last) -> float:
        bank = LayerBank(L, {"w": (d, d)}, {})
        with torch.no_grad():
            bank.weights[:, : d * d] = torch.eye(d).flatten()
            bank.weights[L - 1, : d * d] *= last
        product = torch.eye(d)
        for row in rows:
            product = bank.layers[row].w @ product
        R = (product - 2 * torch.eye(d)).square().sum() / 2
        R.backward()
        # A row moves by minus the mean over its layers, and R by its gradient, which is the sum over them.
        return -sum(float(bank.grads[row] @ bank.grads[row]) / rows.count(row) for row in set(rows)) / R.item()

    assert rate([0] * L, 1.0) == pytest.approx(-2 * L)
    assert rate(list(range(L)), 0.0) == pytest.approx(-2)


# A run


@pytest.mark.parametrize(
    "options", [{}, {"unit": 2, "optimizer_state": "reset"}], ids=["one layer", "two layers, reset"]
)
def test_a_run_unshares_and_goes_on_bitwise(shards, tmp_path, quick, options):
    config = share_then_unshare(settings(shards), ShareThenUnshareOptions(shared=0.4, **options))
    straight = assert_goes_on_bitwise(config, tmp_path, (7, 8, 9))
    unit = options.get("unit", 1)
    start, shared, own = (state_after(straight, step)[0]["model"]["bank"] for step in (1, 8, 9))
    assert not torch.equal(start[:unit], shared[:unit]) and torch.equal(start[unit:], shared[unit:])
    assert len({row.numpy().tobytes() for row in own}) == 4


def test_a_run_whose_layers_part_by_three_low_readings(shards, tmp_path, quick):
    """No two gradients have a cosine of 1: every reading is low, the third after step 6 parts all layers, and nothing is read any more."""
    options = ShareThenUnshareOptions(until="adaptive", every=2, below=1.0)
    config = share_then_unshare(settings(shards), options)
    straight = assert_goes_on_bitwise(config, tmp_path, (3, 4, 6, 7))
    parted = [event for event in log_of(straight) if event["event"] == "growth"]
    assert [(e["step"], e["operator"], e["layer_map"]) for e in parted] == [(6, "unshare", [0, 0, 0, 0])]
    before, at, after = (state_after(straight, step)[0] for step in (5, 6, 7))
    assert "bank.layers.1.step" not in before["optimizer"] and at["optimizer"]["bank.layers.3.step"] == 6
    assert all(torch.equal(row, at["model"]["bank"][0]) for row in at["model"]["bank"])
    assert len({row.numpy().tobytes() for row in after["model"]["bank"]}) == 4
    states = [state_after(straight, step)[1]["state"] for step in (2, 4, 6, 20)]
    assert [state["low_readings"] for state in states] == [1, 2, 0, 0] and states[-1]["rows"] == [0, 1, 2, 3]


@pytest.mark.parametrize("state", ["copy", "reset"])
def test_a_run_whose_groups_split(shards, tmp_path, quick, state):
    options = ShareThenUnshareOptions(until="split", every=3, below=0.8, optimizer_state=state)
    config = share_then_unshare(settings(shards), options)
    straight = assert_goes_on_bitwise(config, tmp_path, (3, 10))
    parted = [event for event in log_of(straight) if event["event"] == "growth"]
    assert parted and all(event["step"] % 3 == 0 for event in parted)
    for event in parted:
        low = sum(cosine < 0.8 for cosine in event["cosines"])
        assert low >= 1


def test_a_run_whose_gradients_agree_shares_to_the_end(shards, tmp_path, quick):
    config = share_then_unshare(settings(shards), ShareThenUnshareOptions(until="adaptive", every=5, below=-1.0))
    straight = assert_goes_on_bitwise(config, tmp_path, (10,))
    assert not any(event["event"] == "growth" for event in log_of(straight))
    assert state_after(straight, 20)[1]["state"]["rows"] == []
