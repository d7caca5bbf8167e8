"""specs/multi_level.md: the V-cycle's stages, what each change of level makes, what is refused, and whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after, trained

from stackbert_kernels.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    Stage,
    TrainConfig,
    from_dict,
    stage_model,
    to_dict,
)
from stackbert_kernels.growth.axes import mapped
from stackbert_kernels.growth.multi_level import coalescing, interpolated
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import plan, relative_step_cost, trainable_parameters
from stackbert_kernels.recipes import MultiLevelOptions, multi_level
from stackbert_kernels.train import loop
from stackbert_kernels.train.optim import Optimizer

BASE = TrainConfig(steps=105_000)


def shapes(config: TrainConfig) -> list[tuple]:
    return [(s.steps, s.grow, s.depth, stage_model(config.model, s).hidden, stage_model(config.model, s).heads) for s in config.stages]  # fmt: skip


def test_two_levels_are_the_published_example():
    config = multi_level(BASE)
    assert shapes(config) == [
        (5000, None, 12, 768, 12),
        (50_000, "coalesce", 6, 384, 6),
        (50_000, "decoalesce", 12, 768, 12),
    ]
    assert [stage_model(config.model, s).inner for s in config.stages] == [3072, 1536, 3072]
    assert {(s.alpha, s.optimizer_state, s.embeddings) for s in config.stages} == {(0.5, "reset", "train")}
    assert from_dict(to_dict(config)) == config


def test_any_number_of_levels():
    config = multi_level(
        replace(BASE, model=ModelConfig(layers=8, hidden=64, heads=8), stages=()), MultiLevelOptions(levels=4)
    )
    assert [(s.grow, s.depth, s.hidden or 64) for s in config.stages] == [
        (None, 8, 64), ("coalesce", 4, 32), ("coalesce", 2, 16), ("coalesce", 1, 8),
        ("decoalesce", 2, 16), ("decoalesce", 4, 32), ("decoalesce", 8, 64),
    ]  # fmt: skip
    assert sum(s.steps for s in config.stages) == BASE.steps
    thirds = multi_level(BASE, MultiLevelOptions(factor=3))
    assert [(s.depth, s.hidden) for s in thirds.stages] == [(12, 0), (4, 256), (12, 0)]


def test_the_published_rates():
    config = multi_level(replace(BASE, optim=OptimConfig(lr=1e-4)), MultiLevelOptions(lr_policy="published"))
    large, small, again = plan(config)
    assert large.lr(4999) == pytest.approx(1e-4, rel=1e-3) and large.lr(0) == pytest.approx(1e-4 / 5000)
    assert small.lr(5000) == pytest.approx(4e-4) and small.lr(30_000) == pytest.approx(2e-4)
    assert again.lr(55_000) == pytest.approx(1e-4) and again.lr(104_999) == pytest.approx(0, abs=1e-8)


def test_a_small_models_cost_is_counted_in_layers_of_the_large_one():
    """Half the layers of half the width: an eighth of the products with weights; attention and the decoder shrink by less."""
    config = multi_level(replace(BASE, model=ModelConfig(vocab_size=1)))
    large, small, _ = (relative_step_cost(config, s) for s in config.stages)
    assert large == 1 and 1 / 8 < small < 1 / 7
    model = Bert(replace(stage_model(config.model, config.stages[1]), vocab_size=1), device="meta")
    assert trainable_parameters(config, config.stages[1]) == sum(p.numel() for p in model.parameters())


def stages(*given: dict) -> tuple[Stage, ...]:
    return tuple(Stage(**({"steps": 10} | stage)) for stage in given)


def run_of(*given: dict, **model) -> TrainConfig:
    shape = ModelConfig(**({"layers": 4, "hidden": 32, "heads": 4} | model))
    return TrainConfig(model=shape, steps=10 * len(given), stages=stages(*given))


LARGE, HALF = {"depth": 4}, {"depth": 2, "hidden": 16, "heads": 2, "inner": 64}
REFUSED = [
    (lambda: MultiLevelOptions(levels=1), "multi_level: levels must be >= 2, got 1"),
    (lambda: MultiLevelOptions(factor=1), "multi_level: factor must be >= 2, got 1"),
    (lambda: MultiLevelOptions(alpha=2.0), "multi_level: alpha must be in [0, 1], got 2.0"),
    (lambda: MultiLevelOptions(layer_groups="pairs"), "multi_level: layer_groups must be one of adjacent, apart, got 'pairs'"),
    (lambda: MultiLevelOptions(optimizer_state="zero"), "multi_level: optimizer_state must be one of reset, copy, got 'zero'"),
    (lambda: MultiLevelOptions(stage_weights=(1.0,)), "multi_level: stage_weights must have 3 numbers, one a stage, got 1"),
    (lambda: multi_level(BASE, MultiLevelOptions(levels=4)), "multi_level: layers must be divisible by factor for each smaller level (8), got 12"),
    (lambda: multi_level(replace(BASE, model=ModelConfig(heads=3), stages=())),
     "multi_level: heads must be divisible by factor for each smaller level (2), got 3"),
    (lambda: multi_level(replace(BASE, steps=2, stages=())), "multi_level: steps must leave each of 3 stages at least 1, got steps 2"),
    (lambda: multi_level(replace(BASE, model=ModelConfig(embedding=128))),
     "multi_level: factorised embeddings have no smaller level, got embedding 128"),
    (lambda: run_of(LARGE, HALF | {"grow": "coalesce"}, LARGE | {"grow": "stack"}), "stages[2]: the width changes by grow='coalesce' or 'decoalesce' or 'widen', got 'stack'"),
    (lambda: run_of(LARGE, LARGE | {"grow": "decoalesce"}), "stages[1]: decoalesce must lead back to the model that was coalesced last"),
    (lambda: run_of(LARGE, HALF | {"grow": "coalesce", "heads": 1}, LARGE | {"grow": "decoalesce"}),
     "stages[1]: heads are grouped whole, so both models must have the same head dim (hidden / heads), got 8 -> 16"),
    (lambda: run_of(LARGE, HALF | {"grow": "coalesce", "depth": 3}, LARGE | {"grow": "decoalesce"}),
     "stages[1]: layers must be a multiple of the smaller model's, got 4 -> 3"),
    (lambda: run_of(LARGE, HALF | {"grow": "coalesce", "optimizer_state": "zero"}, LARGE | {"grow": "decoalesce"}),
     "stages[1]: coalesce is of whole models whose embeddings learn, without shared layers, factorised embedding or optimizer_state 'zero'"),
    (lambda: Stage(steps=1, depth=1, hidden=8), "hidden, heads and inner go together in a stage, got (8, 0, 0)"),
    (lambda: Stage(steps=1, depth=1, alpha=-1.0), "alpha must be in [0, 1], got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


# Runs


def tensors_after(out, step: int, config: TrainConfig, stage: Stage) -> tuple[Bert, Optimizer]:
    """The model and optimizer of a checkpoint."""
    tensors, _ = state_after(out, step)
    vocab = tensors["model"]["word"].shape[0]
    model = Bert(replace(stage_model(config.model, stage), vocab_size=vocab))
    model.use(stage.depth)
    with torch.no_grad():
        model.bank.weights.copy_(tensors["model"]["bank"])
        for name, parameter in model.always_on_parameters().items():
            parameter.copy_(tensors["model"][name])
    optimizer = Optimizer(model, config.optim)
    optimizer.set_window(replace(stage, optimizer_state="copy"))
    optimizer.load_state_dict(tensors["optimizer"])
    return model, optimizer


def weights(model: Bert) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("state", ["reset", "copy"])
def test_a_cycle_goes_on_bitwise(shards, tmp_path, quick, monkeypatch, state):
    """Down by the maps, up by them and interpolated with the weights from before; a restart on either side of each is the same."""
    options = MultiLevelOptions(stage_weights=(6, 8, 6), optimizer_state=state, alpha=0.25)
    config = multi_level(settings(shards), options)
    assert [(s.steps, s.depth) for s in config.stages] == [(6, 4), (8, 2), (6, 4)]
    straight = assert_goes_on_bitwise(config, tmp_path, (5, 6, 7, 13, 14, 15))

    entered, use = {}, loop.use

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        entered[span.first] = weights(model), {name: t.clone() for name, t in optimizer.state_dict().items()}

    monkeypatch.setattr(loop, "use", remember)
    trained(config, tmp_path / "seen")
    (large, _), (small, _) = (
        tensors_after(straight, step, config, s) for step, s in zip((6, 14), config.stages[:2], strict=True)
    )
    maps = coalescing(large.config, small.config)
    for name, tensor in mapped(weights(large), maps).items():
        assert torch.equal(entered[6][0][name], tensor), name
    for name, tensor in interpolated(weights(large), mapped(weights(small), maps.inverse()), 0.25).items():
        assert torch.equal(entered[14][0][name], tensor), name
    for step in (6, 14):
        moments = entered[step][1]
        assert (
            moments["word.exp_avg"].any() == moments["bank.layers.1.inner_weight.exp_avg_sq"].any() == (state == "copy")
        )
        assert moments["bank.layers.1.step"] == (step if state == "copy" else 0)
    kept = {step: "kept" in state_after(straight, step)[0] for step in (6, 7, 14, 15)}
    assert kept == {6: False, 7: True, 14: True, 15: False}
    growth = [event for event in log_of(straight) if event["event"] == "growth"]
    assert [(g["operator"], g["from_depth"], g["depth"], g["from_hidden"], g["hidden"]) for g in growth] == [
        ("coalesce", 4, 2, 32, 16), ("decoalesce", 2, 4, 16, 32)]  # fmt: skip


def test_three_levels_go_on_bitwise_and_export(shards, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    base = settings(shards, steps=15)
    base = replace(base, model=replace(base.model, heads=4), stages=())
    options = MultiLevelOptions(levels=3, stage_weights=(1,) * 5, layer_groups="apart", optimizer_state="copy")
    config = multi_level(base, options)
    straight = assert_goes_on_bitwise(config, tmp_path, (6, 7, 12))
    exported = transformers.BertForMaskedLM.from_pretrained(straight / "model")
    assert (exported.config.num_hidden_layers, exported.config.hidden_size, exported.config.num_attention_heads) == (
        4,
        32,
        4,
    )
    last, _ = tensors_after(straight, 15, config, config.stages[-1])
    assert torch.equal(exported.bert.embeddings.word_embeddings.weight, last.word)
