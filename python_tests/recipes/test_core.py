"""specs/core.md: stages, what relaxed layers have and cost, what is refused, and whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after

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
from stackbert_kernels.growth.refine import new_keys, whole_layer
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import (
    attention_parameters,
    feed_forward_parameters,
    flops_per_token,
    relative_step_cost,
    trainable_parameters,
)
from stackbert_kernels.recipes import CoreOptions, core
from stackbert_kernels.train import loop

BASE = TrainConfig(steps=1000, model=ModelConfig(vocab_size=30522))


def test_half_of_the_steps_are_relaxed():
    config = core(BASE)
    assert config.recipe == "core" and config.stages == (
        Stage(steps=500, depth=12, rank=192, score_dim=32, name="rank 192, scores 32 of 64"),
        Stage(steps=500, depth=12, grow="refine", rewarm=50, name="whole"),
    )
    assert from_dict(to_dict(config)) == config
    relaxed, whole = (stage_model(config.model, stage) for stage in config.stages)
    assert whole == BASE.model and relaxed == replace(BASE.model, rank=192, score_dim=32)


def test_options():
    config = core(
        BASE, CoreOptions(relaxed=0.3, rank=0, score_dim=8, optimizer_state="reset", lr_policy="restart", rewarm=7)
    )
    assert config.stages == (
        Stage(steps=300, depth=12, score_dim=8, lr_policy="restart", name="scores 8 of 64"),
        Stage(steps=700, depth=12, grow="refine", lr_policy="restart", optimizer_state="reset", rewarm=7, name="whole"),
    )
    assert core(BASE, CoreOptions(rank=100, score_dim=0)).stages[0].name == "rank 100"


def test_parameters_of_the_relaxed_model():
    """2 r 5 d / 8 d^2 = 0.3125 of the feed-forward's matrices at r = d / 4; half of the queries' and keys'."""
    config = core(BASE)
    relaxed, whole = (stage_model(config.model, stage) for stage in config.stages)
    vectors = 3072 + 768 + 2 * 768
    matrices = [feed_forward_parameters(model) - vectors for model in (relaxed, whole)]
    assert matrices[0] / matrices[1] == 0.3125 and matrices[1] == 8 * 768**2
    assert attention_parameters(whole) - attention_parameters(relaxed) == 768 * (768 + 1)
    for model, stage in zip((relaxed, whole), config.stages, strict=True):
        assert trainable_parameters(config, stage) == sum(p.numel() for p in Bert(model, device="meta").parameters())


def test_cost_of_the_relaxed_model():
    """Without the head: queries and keys cost half, feed-forward 0.3125; scores cost what they did, filled up with zeros."""
    config = core(replace(BASE, model=ModelConfig(vocab_size=1)))
    C, S = 768, 128
    layer = {True: 4 * C * C + 2 * C * C + 5 * C * C + 4 * S * C, False: 24 * C * C + 4 * S * C}
    relaxed, whole = config.stages
    assert relative_step_cost(config, whole) == 1
    assert relative_step_cost(config, relaxed) == pytest.approx(layer[True] / layer[False], abs=0.01)
    assert flops_per_token(config, relaxed) / flops_per_token(config, whole) == pytest.approx(0.5, abs=0.03)


def stages(*given: dict, **model) -> TrainConfig:
    shape = ModelConfig(**({"layers": 4, "hidden": 32, "heads": 4} | model))
    return TrainConfig(
        model=shape, steps=10 * len(given), stages=tuple(Stage(**({"steps": 10, "depth": 4} | s)) for s in given)
    )


LOW, NARROW, REFINE = {"rank": 8}, {"score_dim": 4}, {"grow": "refine"}
HALF = {"depth": 2, "hidden": 16, "heads": 2, "inner": 64, "grow": "coalesce"}
REFUSED = [
    (lambda: CoreOptions(relaxed=1.0), "core: relaxed must be in (0, 1), got 1.0"),
    (lambda: CoreOptions(rank=-1), "core: rank must be >= 0, got -1"),
    (lambda: CoreOptions(score_dim=-1), "core: score_dim must be >= 0, got -1"),
    (lambda: CoreOptions(rewarm=-1), "core: rewarm must be >= 0, got -1"),
    (lambda: CoreOptions(optimizer_state="keep"), "core: optimizer_state must be one of copy, zero, reset, got 'keep'"),
    (lambda: CoreOptions(lr_policy="curve"), "core: lr_policy must be one of global, restart, got 'curve'"),
    (lambda: core(BASE, CoreOptions(rank=0, score_dim=0)), "core: rank or score_dim must be > 0, or nothing is relaxed"),
    (lambda: core(BASE, CoreOptions(rank=615)), "core: rank must be <= 614, or two factors are no smaller than the matrix, got 615"),
    (lambda: core(BASE, CoreOptions(score_dim=64)), "core: score_dim must be < hidden / heads = 64, got 64"),
    (lambda: core(replace(BASE, steps=1, stages=(), optim=OptimConfig(warmup=0))), "core: steps must leave both stages (relaxed 0.5) at least 1, got steps 1"),
    (lambda: ModelConfig(rank=768), "rank must be in [0, 768) with hidden 768, inner 3072, got 768"),
    (lambda: ModelConfig(score_dim=64), "score_dim must be in [0, hidden / heads = 64), got 64"),
    (lambda: stages({}, rank=8), "stages: relaxed layers must be refined before the run ends, got rank 8, score_dim 0"),
    (lambda: stages(LOW), "stages: relaxed layers must be refined before the run ends, got rank 8, score_dim 0"),
    (lambda: stages(LOW, {}), "stages[1]: rank and score_dim change by grow='refine', got None with rank 8 -> 0, score_dim 0 -> 0"),
    (lambda: stages({}, LOW), "stages[1]: rank and score_dim change by grow='refine', got None with rank 0 -> 8, score_dim 0 -> 0"),
    (lambda: stages({}, REFINE), "stages[1]: refine makes rank or score_dim 0 and changes nothing else, got rank 0 -> 0, score_dim 0 -> 0"),
    (lambda: stages(LOW, REFINE | {"rank": 4}), "stages[1]: refine makes rank or score_dim 0 and changes nothing else, got rank 8 -> 4, score_dim 0 -> 0"),
    (lambda: stages(LOW, REFINE | NARROW), "stages[1]: refine makes rank or score_dim 0 and changes nothing else, got rank 8 -> 0, score_dim 0 -> 4"),
    (lambda: stages(REFINE), "stages[0]: there is nothing to grow from, got grow='refine'"),
    (lambda: stages(LOW | {"depth": 2}, REFINE), "stages[1]: grow must be one of copy_top, stack, interleave, random, identity, got 'refine'"),
    (lambda: stages(LOW | {"embeddings": "freeze"}, REFINE),
     "stages[1]: refine follows a stage in which all learns: embeddings must be 'train' there, got 'freeze'"),
    (lambda: stages(LOW, HALF, {"grow": "decoalesce"}), "stages[1]: relaxed layers (rank, score_dim) have no rule for coalesce: refine them in a stage before"),
    (lambda: stages(LOW | {"inner": 64}, LOW | {"grow": "widen"}, REFINE), "stages[1]: relaxed layers (rank, score_dim) have no rule for widen: refine them in a stage before"),
    (lambda: stages(LOW | {"grow": "fpi"}, REFINE), "stages[0]: relaxed layers (rank, score_dim) have no rule for fpi: refine them in a stage before"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


def test_stages_that_can_follow_each_other():
    """Deeper while relaxed, one part whole before the other, the window narrower or the feed-forward wider afterwards."""
    stages(LOW | NARROW | {"depth": 2}, LOW | NARROW | {"grow": "stack"}, LOW | REFINE, REFINE)
    stages(NARROW | {"depth": 2}, REFINE | {"depth": 2}, {"grow": "copy_top", "train_from": 2, "embeddings": "freeze"})
    stages(LOW | {"inner": 64}, {"inner": 64} | REFINE, {"grow": "widen"})
    stages({"rows": (0, 0, 1, 1)} | LOW, {"rows": (0, 0, 1, 1)} | REFINE, {"grow": "unshare"})


def test_a_relaxed_model_is_not_exported():
    pytest.importorskip("transformers")
    from stackbert_kernels.model.hf import to_transformers

    with pytest.raises(
        ValueError, match="transformers has no relaxed layers, refine them first: got rank 8, score_dim 0"
    ):
        to_transformers(Bert(ModelConfig(layers=1, hidden=32, heads=4, vocab_size=9, max_position=8, rank=8)))


# Runs


@pytest.mark.parametrize(
    ("given", "optimizer"), [({}, "adamw"), ({"score_dim": 0, "optimizer_state": "reset"}, "adamw"), ({"rank": 5, "optimizer_state": "zero"}, "lamb")],
    ids=["copy", "rank, reset", "zero, lamb"],
)  # fmt: skip
def test_a_run_becomes_whole_and_goes_on_bitwise(shards, tmp_path, quick, monkeypatch, given, optimizer):
    base = settings(shards, optim=OptimConfig(lr=1e-2, optimizer=optimizer))
    config = core(base, CoreOptions(relaxed=0.4, **given))
    entered, use = {}, loop.use

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        named = {**dict(model.named_parameters()), **optimizer.state_dict()}
        entered.setdefault(span.first, {name: tensor.detach().clone() for name, tensor in named.items()})

    monkeypatch.setattr(loop, "use", remember)
    straight = assert_goes_on_bitwise(config, tmp_path, (7, 8, 9) if not given else (8,))

    saved, begun = state_after(straight, 8)[0], entered[8]
    relaxed, whole = (stage_model(config.model, stage) for stage in config.stages)
    model = Bert(replace(relaxed, vocab_size=len(saved["model"]["word"])))
    model.bank.weights.copy_(saved["model"]["bank"])
    for i in range(4):
        prefix = f"bank.layers.{i}."
        layer = {name: p.detach() for name, p in model.bank.layers[i].named_parameters()}
        for slot, tensor in whole_layer(layer, relaxed, whole, new_keys(relaxed, config.seed, i)).items():
            assert torch.equal(begun[prefix + slot], tensor), slot
    assert torch.equal(begun["word"], saved["model"]["word"])
    assert not begun["bank.layers.1.inner_weight.exp_avg"].any()
    assert begun["bank.layers.1.out_weight.exp_avg"].any() == (config.stages[1].optimizer_state == "copy")

    names = {step: state_after(straight, step)[0]["optimizer"] for step in (8, 9)}
    assert "bank.layers.0.inner_reduce.exp_avg" in names[8] and "bank.layers.0.inner_weight.exp_avg" in names[9]
    assert names[9]["bank.layers.2.step"] == (9 if config.stages[1].optimizer_state == "copy" else 1)
    assert names[9]["word.step"] == (1 if config.stages[1].optimizer_state == "reset" else 9)
    growth = [event for event in log_of(straight) if event["event"] == "growth"]
    assert [(g["operator"], g["step"], g["from_depth"], g["depth"]) for g in growth] == [("refine", 8, 4, 4)]
    assert [(g["from_rank"], g["rank"], g["from_score_dim"], g["score_dim"]) for g in growth] == [
        (relaxed.rank, 0, relaxed.score_dim, 0)]  # fmt: skip


def test_a_run_that_grows_while_it_is_relaxed(shards, tmp_path, quick):
    """Two layers, four, feed-forward whole, all whole."""
    base = settings(shards)
    low, narrow = {"rank": 8}, {"score_dim": 8}
    parts = (
        Stage(steps=5, depth=2, **low, **narrow),
        Stage(steps=5, depth=4, grow="stack", **low, **narrow),
        Stage(steps=5, depth=4, grow="refine", **narrow),
        Stage(steps=5, depth=4, grow="refine", optimizer_state="zero"),
    )
    straight = assert_goes_on_bitwise(replace(base, stages=parts, recipe="core"), tmp_path, (10, 12, 15))
    events = [(e["event"], e.get("operator")) for e in log_of(straight) if e["event"] == "growth"]
    assert events == [("growth", "stack"), ("growth", "refine"), ("growth", "refine")]
