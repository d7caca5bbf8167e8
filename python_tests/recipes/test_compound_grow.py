"""specs/compound_grow.md: stages, costs, what is refused, what each growth leaves as it was, and whole runs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after, trained

from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, Stage, TrainConfig, from_dict, to_dict
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import flops_per_token, plan, relative_step_cost, trainable_parameters
from stackbert_kernels.recipes import CompoundGrowOptions, compound_grow
from stackbert_kernels.train import loop
from stackbert_kernels.train.budget import timing_of
from stackbert_kernels.train.optim import Optimizer

BASE = TrainConfig(steps=1000)


def of(layers: int, **model) -> TrainConfig:
    return replace(BASE, model=ModelConfig(**({"layers": layers, "hidden": 32, "heads": 2} | model)), stages=())


def test_stages_of_twelve_layers():
    config = compound_grow(BASE)
    shared = {"optimizer_state": "reset"}
    assert config.stages == (
        Stage(steps=300, depth=6, inner=1536, pool=2, name="6 layers, inner 1536, pool 2", **shared),
        Stage(steps=200, depth=12, grow="stack", inner=1536, pool=2, name="12 layers, inner 1536, pool 2", **shared),
        Stage(steps=500, depth=12, grow="widen", name="all", **shared),
    )
    assert from_dict(to_dict(config)) == config
    assert timing_of(lambda steps: compound_grow(replace(BASE, steps=steps, stages=()))).steps == 90


@pytest.mark.parametrize("layers", [2, 4, 10, 24])
def test_any_even_depth(layers):
    config = compound_grow(of(layers))
    assert [(s.depth, s.grow, s.inner, s.pool) for s in config.stages] == [
        (layers // 2, None, 64, 2),
        (layers, "stack", 64, 2),
        (layers, "widen", 0, 1),
    ]


def test_options():
    options = CompoundGrowOptions(
        shares=(1, 1, 2), inner_ratio=4, pool=3, pool_kind="max", split_noise=0.0, optimizer_state="copy", lr_policy="restart"
    )  # fmt: skip
    config = compound_grow(of(4), options)
    assert [(s.steps, s.inner, s.pool, s.pool_kind) for s in config.stages] == [
        (250, 32, 3, "max"),
        (250, 32, 3, "max"),
        (500, 0, 1, "mean"),
    ]
    assert {(s.optimizer_state, s.lr_policy, s.split_noise) for s in config.stages} == {("copy", "restart", 0.0)}
    deep = compound_grow(of(4), CompoundGrowOptions(inner_ratio=1, pool=1))
    assert [(s.grow, s.inner, s.pool) for s in deep.stages] == [(None, 0, 1), ("stack", 0, 1), (None, 0, 1)]


def test_costs_know_the_pooled_length_and_the_narrow_layer():
    """Of 128 tokens 19 are predicted: 1 + 54 + 19 rows, 0.578 a token; of a layer's 12 C^2 products half of 8 C^2 are there."""
    config = compound_grow(replace(BASE, model=ModelConfig(vocab_size=1), data=DataConfig(mask_rate=0.15)))
    first, second, last = (relative_step_cost(config, s) for s in config.stages)
    share = 74 / 128 * (8 / 12)  # without attention, which is 4 S C of 24 C^2 + 4 S C
    assert last == 1 and second == pytest.approx(share, rel=0.02) and first == pytest.approx(second / 2, rel=0.02)
    flops = [flops_per_token(config, s) for s in config.stages]
    assert flops[1] / flops[2] == pytest.approx(second, rel=0.02)
    model = Bert(ModelConfig(vocab_size=1, inner=1536), device="meta")
    assert trainable_parameters(config, config.stages[1]) == sum(p.numel() for p in model.parameters())


def run_of(*given: dict, **model) -> TrainConfig:
    shape = ModelConfig(**({"layers": 4, "hidden": 32, "heads": 2} | model))
    stages = tuple(Stage(**({"steps": 10, "depth": 4} | stage)) for stage in given)
    return TrainConfig(model=shape, steps=10 * len(given), stages=stages)


NARROW, WIDE = {"inner": 64}, {"grow": "widen"}
REFUSED = [
    (lambda: CompoundGrowOptions(shares=(1.0, 2.0)), "compound_grow: shares must be 3 numbers > 0, one a stage, got (1.0, 2.0)"),
    (lambda: CompoundGrowOptions(shares=(1.0, 0.0, 1.0)), "compound_grow: shares must be 3 numbers > 0, one a stage, got (1.0, 0.0, 1.0)"),
    (lambda: CompoundGrowOptions(inner_ratio=0), "compound_grow: inner_ratio must be >= 1, got 0"),
    (lambda: CompoundGrowOptions(pool=0), "compound_grow: pool must be >= 1, got 0"),
    (lambda: CompoundGrowOptions(split_noise=-1.0), "compound_grow: split_noise must be >= 0 and finite, got -1.0"),
    (lambda: CompoundGrowOptions(pool_kind="concat"), "compound_grow: pool_kind must be one of mean, max, got 'concat'"),
    (lambda: CompoundGrowOptions(optimizer_state="zero"), "compound_grow: optimizer_state must be one of reset, copy, got 'zero'"),
    (lambda: CompoundGrowOptions(lr_policy="published"), "compound_grow: lr_policy must be one of global, restart, got 'published'"),
    (lambda: compound_grow(of(3)), "compound_grow: layers must be even, got 3"),
    (lambda: compound_grow(of(4, inner=129)), "compound_grow: inner must be divisible by inner_ratio 2, got inner 129"),
    (lambda: compound_grow(replace(of(4), steps=2, stages=())), "compound_grow: steps must leave each of 3 stages at least 1, got steps 2"),
    (lambda: compound_grow(of(4), CompoundGrowOptions(pool=256)), "pool must be in [1, 255], got 256"),
    (lambda: run_of(NARROW, {}), "stages[1]: the width changes by grow='coalesce' or 'decoalesce' or 'widen', got None"),
    (lambda: run_of(NARROW, NARROW), "stages: inner must be the run's 128 before the run ends, got 64"),
    (lambda: run_of({}, WIDE), "stages[1]: widen makes a multiple of inner and changes no other size, got inner 128 -> 128, hidden 32 -> 32, heads 2 -> 2"),
    (lambda: run_of({"inner": 96}, WIDE), "stages[1]: widen makes a multiple of inner and changes no other size, got inner 96 -> 128, hidden 32 -> 32, heads 2 -> 2"),
    (lambda: run_of(NARROW | {"depth": 2}, WIDE), "stages[1]: grow must be one of copy_top, stack, interleave, random, identity, got 'widen'"),
    (lambda: run_of(NARROW, WIDE | {"optimizer_state": "zero"}),
     "stages[1]: widen is of layers with rows of their own, after a stage in which all learns, without optimizer_state 'zero'"),
    (lambda: run_of(NARROW | {"grow": "fpi"}, WIDE), "stages[0]: what begins from a source begins with the run's own width, got inner 64"),
    (lambda: run_of({"pool": 2}), "stages: the last stage must read every token, got pool 2"),
    (lambda: Stage(steps=1, depth=1, pool_kind="concat"), "pool_kind must be one of mean, max, got 'concat'"),
    (lambda: Stage(steps=1, depth=1, split_noise=0.5), "split_noise belongs to grow 'widen', got grow=None"),
    (lambda: Stage(steps=1, depth=1, heads=2, inner=8), "hidden, heads and inner go together in a stage, got (0, 2, 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


# Runs


def tensors(model: Bert, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights | {name: t.clone() for name, t in optimizer.state_dict().items()}


def seen(monkeypatch) -> dict[str, dict]:
    """Of a run: weights and moments at the beginning of each stage and at the end of the one before, by step; and what it read."""
    found = {"left": {}, "entered": {}, "trained": [], "evaluated": []}
    grow, use, forward, evaluate = loop._grow, loop.use, Bert._losses, Bert.evaluate

    def remember_grow(model, optimizer, span, kept):
        found["left"][span.first] = tensors(model, optimizer)
        return grow(model, optimizer, span, kept)

    def remember_use(model, optimizer, span):
        use(model, optimizer, span)
        found["entered"][span.first] = tensors(model, optimizer)

    def remember_forward(model, batch, *rest):
        found["trained"].append(batch.windows)
        return forward(model, batch, *rest)

    def remember_evaluate(model, batch):
        found["evaluated"].append(batch.windows)
        return evaluate(model, batch)

    monkeypatch.setattr(loop, "_grow", remember_grow)
    monkeypatch.setattr(loop, "use", remember_use)
    monkeypatch.setattr(Bert, "_losses", remember_forward)
    monkeypatch.setattr(Bert, "evaluate", remember_evaluate)
    return found


def layer_of(name: str) -> tuple[int, str] | None:
    parts = name.split(".", 3)
    return (int(parts[2]), parts[3]) if name.startswith("bank.layers.") else None


@pytest.mark.parametrize("options", [
    CompoundGrowOptions(split_noise=0.5), CompoundGrowOptions(optimizer_state="copy", pool_kind="max", pool=3),
], ids=["unequal shares", "copy"])  # fmt: skip
def test_a_run_goes_on_bitwise(shards, tmp_path, quick, monkeypatch, options):
    config = compound_grow(settings(shards), options)
    assert [s.last for s in plan(config)] == [6, 10, 20]
    straight = assert_goes_on_bitwise(config, tmp_path, (6, 11) if options.pool == 3 else (5, 10))
    found = seen(monkeypatch)
    trained(config, tmp_path / "seen")
    copied = options.optimizer_state == "copy"

    # Stacked: target layer i is small layer i mod 2, bit for bit, and so are its moments; nothing else moves.
    before, after = found["left"][6], found["entered"][6]
    for name, tensor in after.items():
        layer = layer_of(name)
        weight = not name.endswith((".step", ".exp_avg", ".exp_avg_sq")) and name != "skipped"
        old = before[name if layer is None else f"bank.layers.{layer[0] % 2}.{layer[1]}"]
        if weight or copied:
            assert torch.equal(tensor, old), name
        elif name != "skipped":
            assert not tensor.any(), name
    assert not torch.equal(before["bank.layers.2.inner_weight"], after["bank.layers.2.inner_weight"])

    # Widened: halves, and what has no inner neurons is as it was.
    before, after = found["left"][10], found["entered"][10]
    for i in range(4):
        narrow, wide = (state[f"bank.layers.{i}.inner_weight"] for state in (before, after))
        assert torch.equal(wide, torch.cat([narrow, narrow]))
        wide, equal = after[f"bank.layers.{i}.outer_weight"], before[f"bank.layers.{i}.outer_weight"] / 2
        torch.testing.assert_close(wide[:, :64] + wide[:, 64:], 2 * equal, rtol=1e-5, atol=1e-8)
        assert torch.equal(wide, torch.cat([equal, equal], 1)) == (options.split_noise == 0)
    same = [name for name in before if "inner_" not in name and "outer_weight" not in name]
    for name in same:
        moment = name.endswith((".step", ".exp_avg", ".exp_avg_sq"))
        if copied or not moment:
            assert torch.equal(after[name], before[name]), name
        else:
            assert not after[name].any(), name

    growth = [event for event in log_of(straight) if event["event"] == "growth"]
    assert [(g["operator"], g["step"], g["depth"]) for g in growth] == [("stack", 6, 4), ("widen", 10, 4)]
    assert growth[0]["layer_map"] == [0, 1, 0, 1]
    said = {name: growth[1][name] for name in ("from_inner", "inner", "copies", "copies_have_equal_gradients")}
    wanted = {"from_inner": 64, "inner": 128, "copies": 2, "copies_have_equal_gradients": options.split_noise == 0}
    assert said == wanted

    # The first ten steps read pooled tokens; what is evaluated never is.
    kinds = [None if w is None else (w.kind, len(w.sources)) for w in found["trained"]]
    assert kinds == [(options.pool_kind, options.pool)] * 10 + [None] * 10
    assert len(found["evaluated"]) >= 5 and set(found["evaluated"]) == {None}
    states = [state_after(straight, step)[1] for step in (9, 10, 11)]
    known = from_dict(states[0]["config"])
    for stage, (before, after) in zip(known.stages[1:], itertools.pairwise(s["state"] for s in states), strict=True):
        spent = flops_per_token(known, stage) * (after["tokens"] - before["tokens"])
        assert after["flops"] - before["flops"] == pytest.approx(spent)


def test_dropping_the_pooling_changes_no_weight(shards, tmp_path, quick, monkeypatch):
    """Length alone comes back: no event, and with moments copied nothing at all changes."""
    options = CompoundGrowOptions(inner_ratio=1, optimizer_state="copy")
    config = compound_grow(settings(shards, optim=replace(settings(shards).optim, accumulate=2)), options)
    entered = {}
    use = loop.use

    def remember(model, optimizer, span):
        before = tensors(model, optimizer)
        use(model, optimizer, span)
        entered[span.first] = before, tensors(model, optimizer)

    monkeypatch.setattr(loop, "use", remember)
    trained(config, tmp_path / "seen")
    before, after = entered[10]
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [e["operator"] for e in log_of(tmp_path / "seen") if e["event"] == "growth"] == ["stack"]


def test_batches_of_stages_that_do_not_pool_are_left_alone(shards):
    """The thread is asked for nothing where no stage pools; else it hands over what it has, also for steps past the end."""
    assert loop._pooled(plan(compound_grow(settings(shards), CompoundGrowOptions(pool=1)))) is None
    change = loop._pooled(plan(compound_grow(settings(shards))))
    batch = object()
    assert change(10, batch) is batch and change(10**6, batch) is batch


def test_pooled_pairs_with_short_samples_first(shards, tmp_path, quick):
    """[CLS] is read for the pair; sequences of two lengths; a pre-norm encoder; maxima of windows of four."""
    base = settings(shards)
    base = replace(base, model=replace(base.model, objective="mlm+sop", norm="pre"), stages=(),
                   data=replace(base.data, short_seq_len=12, short_share=0.4))  # fmt: skip
    config = compound_grow(base, CompoundGrowOptions(pool=4, pool_kind="max", lr_policy="restart", inner_ratio=4))
    straight = assert_goes_on_bitwise(config, tmp_path, (8,))
    losses = [event["loss"] for event in log_of(straight) if event["event"] == "step"]
    assert all(loss > 0 for loss in losses)
