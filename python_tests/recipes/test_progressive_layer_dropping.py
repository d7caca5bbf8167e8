"""specs/progressive_layer_dropping.md: schedules, gates, what a left-out layer launches, and a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model.samples import batch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from train.runs import assert_goes_on_bitwise, assert_same_state, log_of, settings, state_after, trained

from stackbert_kernels import ops
from stackbert_kernels.config import ConfigError, LayerDrop, OptimConfig, Stage, TrainConfig, from_dict
from stackbert_kernels.plan import expected_layers, flops_per_token, layer_chances, plan, relative_step_cost, theta
from stackbert_kernels.recipes import ProgressiveLayerDroppingOptions as Options
from stackbert_kernels.recipes import baseline
from stackbert_kernels.recipes import progressive_layer_dropping as dropping
from stackbert_kernels.train import loop

BASE = TrainConfig(steps=1000)


def test_one_pre_norm_stage():
    config = dropping(BASE)
    assert config.stages == (Stage(steps=1000, depth=12, drop=LayerDrop(0.5, 0.1), name="keep 0.5"),)
    assert (config.model.norm, config.model.scaled_init) == ("pre", True)
    other = dropping(BASE, Options(keep=0.7, gamma=0.01, deepspeed_compat=True, scaled_init=False))
    assert other.stages[0].drop == LayerDrop(0.7, 0.01, True) and not other.model.scaled_init
    assert dropping(BASE, Options(keep=1.0)).stages[0].drop == LayerDrop()


@pytest.mark.parametrize(
    ("t", "value"),
    [
        (0, 1),
        (1, 0.9995),
        (100, 0.952419),
        (500, 0.803265),
        (1000, 0.683940),
        (2000, 0.567668),
        (5000, 0.503369),
        (10_000, 0.500023),
    ],
)
def test_schedule_in_time(t, value):
    assert theta(LayerDrop(0.5, 0.001), t) == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(("compat", "layers_run"), [(False, 8.75), (True, 9.25)])
def test_schedule_in_depth(compat, layers_run):
    """(3L - 1) / 4 of the paper's form, (3L + 1) / 4 of DeepSpeed's, at theta = 1/2."""
    stage = Stage(steps=10, depth=12, drop=LayerDrop(0.5, 1.0, compat))
    chances, scales = layer_chances(stage, 0.5)
    assert sum(chances) == pytest.approx(layers_run)
    assert [1 / scale for scale in scales] == pytest.approx([1 - (layer + 1) / 24 for layer in range(12)])
    assert chances == pytest.approx([1 - (layer + (not compat)) / 24 for layer in range(12)])


@pytest.mark.parametrize("compat", [False, True])
def test_gates_are_drawn_as_often_as_the_schedule_says(compat):
    """4,000 steps whose theta has fallen: 5 standard errors of a share are at most 0.04."""
    config = dropping(replace(BASE, steps=4000, stages=()), Options(gamma=50.0, deepspeed_compat=compat))
    (span,) = plan(config)
    drawn = [span.gates(step) for step in range(1, 4000)]
    shares = [sum(gates[layer] > 0 for gates in drawn) / len(drawn) for layer in range(12)]
    assert shares == pytest.approx(layer_chances(span.stage, 0.5)[0], abs=0.04)
    assert {gate for gates in drawn for gate in gates if gate} == set(
        layer_chances(span.stage, theta(span.stage.drop, 3999))[1]
    )
    assert shares[0] == 1.0 if compat else shares[0] < 1.0
    assert expected_layers(span.stage) == pytest.approx(shares, abs=0.04)


def test_gates_are_a_function_of_seed_and_step():
    config = dropping(BASE)
    (span,), (again,), (other,) = plan(config), plan(config), plan(replace(config, seed=1))
    forward = [span.gates(step) for step in range(200)]
    assert [again.gates(step) for step in reversed(range(200))] == forward[::-1]
    assert [other.gates(step) for step in range(200)] != forward and len(set(forward)) > 50
    assert plan(baseline(BASE))[0].gates(5) is None


def test_expected_cost():
    """The mean of theta over the steps, by summation; a quarter of the layers' work is saved once theta has fallen."""
    config = dropping(BASE)
    stage = config.stages[0]
    by_step = [sum(layer_chances(stage, theta(stage.drop, t))[0]) for t in range(1000)]
    assert sum(expected_layers(stage)) == pytest.approx(sum(by_step) / 1000)
    assert 0.7 < relative_step_cost(config, stage) < 0.8
    (span,) = plan(config)
    real = sum(flops_per_token(config, stage, span.gates(step)) for step in range(1000)) / 1000
    assert real == pytest.approx(flops_per_token(config, stage), rel=0.02)
    full = flops_per_token(config, Stage(steps=1000, depth=12))
    assert flops_per_token(config, stage, (1.0,) * 12) == full
    assert flops_per_token(config, stage, (0.0,) * 12) < 0.2 * full


REFUSED = [
    (lambda: Options(keep=0.0), "progressive_layer_dropping: keep must be in [0.001, 1], got 0.0"),
    (lambda: Options(gamma=-1.0), "progressive_layer_dropping: gamma must be >= 0 and finite, got -1.0"),
    (lambda: LayerDrop(0.5), "drop: gamma must be > 0 with keep 0.5, got 0.0"),
    (lambda: Stage(steps=1, depth=4, train_from=2, embeddings="freeze", drop=LayerDrop(0.5, 1.0)),
     "layers are left out only where all learn: train_from must be 0 with drop, got 2"),
    (lambda: TrainConfig(steps=1, stages=(Stage(steps=1, depth=12, drop=LayerDrop(0.5, 1.0)),)),
     "layers can be left out of a pre-norm encoder: norm must be 'pre' with drop, got 'post'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


# The model


class Launched(TorchDispatchMode):
    """The names of all operations that torch runs, ours included, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def launched(model, gates) -> list[str]:
    model.zero_grad()
    with Launched() as mode:
        model(batch(), rng=ops.new_rng(1, 1), gates=gates).loss.backward()
    return mode.names


def test_layers_that_are_left_out_launch_nothing():
    """Of four layers two are left out: exactly what an encoder of two layers launches, forward and backward."""
    small, large = tiny(norm="pre", layers=2), tiny(norm="pre", layers=4)
    assert launched(large, (0.0, 1.0, 0.0, 1.0)) == launched(small, None)
    assert not large.bank.grads[[0, 2]].any() and large.bank.grads[1].any() and large.bank.grads[3].any()
    assert launched(large, (1.0,) * 4) == launched(large, None)


def test_all_layers_left_out_is_the_embedding_and_the_head():
    model = tiny(norm="pre")
    names = launched(model, (0.0,) * 4)
    assert not model.bank.grads.any() and not any("attention" in name for name in names)
    assert model.word.grad.any() and model.final_norm.weight.grad.any()


def test_gates_of_another_length_or_norm_are_refused():
    with pytest.raises(
        ValueError, match="gates must be one for each of 4 layers of a pre-norm encoder, got 2 with norm 'pre'"
    ):
        tiny(norm="pre")(batch(), rng=ops.new_rng(1), gates=(1.0, 1.0))
    with pytest.raises(ValueError, match="got 4 with norm 'post'"):
        tiny()(batch(), rng=ops.new_rng(1), gates=(1.0,) * 4)


def test_the_expectation_over_gates_is_the_ungated_layer_to_first_order():
    """One layer, p = 1/2, float64: with branches of half the size the difference is a quarter."""
    differences = []
    for size in (0.02, 0.01):
        model = tiny(norm="pre", layers=1, dropout=0.0).double()
        with torch.no_grad():
            for name in ("out_weight", "out_bias", "outer_weight", "outer_bias"):
                getattr(model.bank.layers[0], name).mul_(size)
            ran, left_out, whole = (model.encode(batch(), gates=gates) for gates in ((2.0,), (0.0,), None))
        differences.append(float(((ran + left_out) / 2 - whole).abs().max()))
    assert differences[1] == pytest.approx(differences[0] / 4, rel=0.1)


# Runs


def toy(shards, options=Options(gamma=0.2), **changes):  # noqa: B008 (frozen)
    return dropping(settings(shards, **changes), options)


@pytest.mark.parametrize(
    "options", [Options(gamma=0.2), Options(gamma=0.2, deepspeed_compat=True)], ids=["paper", "deepspeed"]
)
def test_a_run_goes_on_bitwise(shards, tmp_path, quick, options):
    config = toy(shards, options, optim=OptimConfig(lr=1e-2, accumulate=2))
    straight = assert_goes_on_bitwise(config, tmp_path, (5, 19))
    (span,) = plan(config)
    tokens = [0] + [state_after(straight, step)[1]["state"]["tokens"] for step in range(1, 21)]
    resolved = from_dict(state_after(straight, 20)[1]["config"])  # knows the size of the vocabulary
    ours = sum(
        flops_per_token(resolved, span.stage, span.gates(step)) * (tokens[step + 1] - tokens[step])
        for step in range(20)
    )
    assert state_after(straight, 20)[1]["state"]["flops"] == pytest.approx(ours)
    assert log_of(straight)[-1]["eval_loss"] > 0


def test_all_parts_of_a_step_leave_out_the_same_layers(shards, tmp_path, quick, monkeypatch):
    seen, encode = {}, loop.Bert.encode

    def remember(model, tokens, **keywords):
        if model.training and torch.is_grad_enabled():
            seen.setdefault(int(keywords["rng"][1]) // 3, []).append(keywords["gates"])
        else:
            assert keywords.get("gates") is None
        return encode(model, tokens, **keywords)

    monkeypatch.setattr(loop.Bert, "encode", remember)
    config = toy(shards, optim=OptimConfig(lr=1e-2, accumulate=3))
    trained(config, tmp_path / "run")
    (span,) = plan(config)
    assert seen == {step: [span.gates(step)] * 3 for step in range(20)}
    assert any(0.0 in parts[0] for parts in seen.values())


def test_keeping_all_layers_is_the_baseline_bit_for_bit(shards, tmp_path, quick):
    config = toy(shards, Options(keep=1.0), checkpoint_every=20)
    trained(config, tmp_path / "kept")
    trained(baseline(replace(config, stages=())), tmp_path / "baseline")
    left, right = (state_after(tmp_path / name, 20) for name in ("kept", "baseline"))
    left[1].pop("config"), right[1].pop("config")
    assert_same_state(left, right)


def test_scaled_init():
    plain, scaled = tiny(norm="pre"), tiny(norm="pre", scaled_init=True)
    ends = {"out_weight", "outer_weight"}
    for slot in plain.bank.layout:
        factor = 8**-0.5 if slot.name in ends else 1.0
        torch.testing.assert_close(slot.view(scaled.bank.weights[1]), factor * slot.view(plain.bank.weights[1]))
