"""Short samples for the first share of a run: which steps have them, what they cost, and that a run goes on bitwise over the change."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after

from stackbert_kernels.compare.comparison import evaluated_otherwise
from stackbert_kernels.compare.runs import read_run
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, Stage, TrainConfig, from_dict
from stackbert_kernels.data.batches import Batches, heldout
from stackbert_kernels.plan import (
    baseline_stage,
    cost_table,
    flops_per_token,
    head_cost,
    layer_flops,
    plan,
    relative_step_cost,
    span_at,
    span_cost,
    span_flops,
    step_cost,
)
from stackbert_kernels.recipes import NEED_SOURCE, NEED_TEACHER, RECIPES, MsltOptions, mslt
from stackbert_kernels.train import loop
from stackbert_kernels.train.budget import timing_of

BERT = TrainConfig(data=DataConfig(seq_len=512, short_seq_len=128, batch_tokens=4096), steps=1000)


def phased(shards, steps: int = 20, **data) -> TrainConfig:
    """Samples of 8 tokens in the first 12 of 20 steps, then of 16."""
    config = settings(shards, steps=steps)
    return replace(config, data=replace(config.data, **{"short_seq_len": 8, "short_share": 0.6} | data))


def same(left, right) -> bool:
    names = ("input_ids", "labels", "masked", "cu_seqlens", "sample_ids", "positions")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


REFUSED = [
    ({"short_seq_len": 4}, "short_seq_len must be 0 or in [8, seq_len), got short_seq_len 4, seq_len 128"),
    ({"short_seq_len": -8}, "short_seq_len must be 0 or in [8, seq_len), got short_seq_len -8, seq_len 128"),
    ({"short_seq_len": 128}, "short_seq_len must be 0 or in [8, seq_len), got short_seq_len 128, seq_len 128"),
    ({"short_seq_len": 64, "short_share": 0.0}, "short_share must be in (0, 1), got 0.0"),
    ({"short_seq_len": 64, "short_share": 1.0}, "short_share must be in (0, 1), got 1.0"),
    ({"short_seq_len": 64, "short_share": float("nan")}, "short_share must be in (0, 1), got nan"),
    ({"short_share": 0.5}, "short_share needs short_seq_len, got short_share 0.5 without it"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(given, message):
    with pytest.raises(ConfigError) as error:
        DataConfig(**given)
    assert str(error.value) == message


@pytest.mark.parametrize(("share", "steps"), [(0.9, 4), (0.1, 4)])
def test_refuses_a_run_without_room_for_both(share, steps):
    with pytest.raises(ConfigError) as error:
        TrainConfig(data=DataConfig(short_seq_len=64, short_share=share), steps=steps)
    assert str(error.value) == f"steps must leave both lengths (short_share {share}) at least 1, got steps 4"


# Which steps


def test_ninety_percent_then_the_rest():
    assert (BERT.short_steps, [BERT.seq_len(step) for step in (0, 899, 900, 999)]) == (900, [128, 128, 512, 512])
    assert TrainConfig().short_steps == 0 and TrainConfig().seq_len(0) == 128
    assert [span.lengths for span in plan(mslt(BERT))] == [((128, 210),)] * 4 + [((128, 60), (512, 100))]
    assert [span.lengths for span in plan(mslt(BERT, MsltOptions(joint=0.1)))] == [((128, 225),)] * 4 + [((512, 100),)]
    assert [span.lengths for span in plan(mslt(TrainConfig()))] == [((128, 210),)] * 4 + [((128, 160),)]


def test_a_batch_is_that_of_its_length(shards):
    """Before the change that of the short samples, after it that of the long ones, at the same step; ranks, parts and copies alike."""
    config = phased(shards)
    short, full = (
        replace(DataConfig(), **vars(config.data) | {"short_seq_len": 0, "short_share": 0.9, "seq_len": n})
        for n in (8, 16)
    )
    batches = Batches(shards, config.data, "mlm", 3, short_steps=12)
    copy = pickle.loads(pickle.dumps(batches))
    wanted = [Batches(shards, data, "mlm", 3) for data in (short, full)]
    for step in (0, 11, 12, 19, 500):
        assert same(batches[step], wanted[step >= 12][step]) and same(copy[step], batches[step])
        parts = batches.parts(step, 3)
        assert torch.equal(torch.cat([part.input_ids for part in parts]), batches[step].input_ids)
        assert (batches[step].max_seqlen <= 8) == (step < 12)
    ranks = [Batches(shards, config.data, "mlm", 3, rank=rank, world_size=2, short_steps=12)[5] for rank in (0, 1)]
    assert torch.equal(torch.cat([part.input_ids for part in ranks]), batches[5].input_ids)
    stream = batches.prefetch(11, 2)
    assert [max(p.max_seqlen for p in next(stream)) > 8 for _ in range(2)] == [False, True]
    stream.close()
    with pytest.raises(IndexError):
        batches[-1]


def test_evaluation_keeps_its_length(shards):
    config, plain = phased(shards), settings(shards)
    pairs = zip(*(heldout(shards, c.data, "mlm", 0) for c in (config, plain)), strict=True)
    assert all(same(a, b) for a, b in pairs)
    assert evaluated_otherwise(config, plain) == []
    other = replace(config, data=replace(config.data, seq_len=12))
    assert evaluated_otherwise(other, plain) == ["seq_len 12 and 16"]


# What it costs


def test_flops_differ_by_attention_alone():
    """4 S C a layer and token forward, twice that backward; what masked-LM heads do does not depend on the length."""
    stage = baseline_stage(BERT)
    long, short = (flops_per_token(BERT, stage, seq_len=S) for S in (512, 128))
    assert long - short == pytest.approx(12 * 12 * 768 * (512 - 128), rel=1e-12)
    assert flops_per_token(BERT, stage) == long
    plain = replace(BERT, data=replace(BERT.data, seq_len=128, short_seq_len=0))
    assert short == flops_per_token(plain, stage)
    pair = replace(BERT, model=ModelConfig(objective="mlm+nsp"))
    assert flops_per_token(pair, stage, seq_len=128) == flops_per_token(replace(pair, data=plain.data), stage)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in NEED_SOURCE + NEED_TEACHER])
def test_costs_are_the_sum_over_the_steps(recipe):
    function, options = RECIPES[recipe]
    config = function(BERT, options())
    spans = plan(config)
    lengths = [config.seq_len(step) for step in range(1000)]
    costs = [relative_step_cost(config, span_at(spans, step).stage, seq_len=lengths[step]) for step in range(1000)]
    flops = [flops_per_token(config, span_at(spans, step).stage, seq_len=lengths[step]) for step in range(1000)]
    assert sum(span_cost(span) * span.stage.steps for span in spans) == pytest.approx(sum(costs))
    assert sum(span_flops(span) * span.stage.steps for span in spans) == pytest.approx(sum(flops))
    table = cost_table(config)
    assert "samples of up to 128 tokens in steps 0-900, then of up to 512: 0.9" in table and " seq len " in table
    full = baseline_stage(config)
    whole = sum(flops_per_token(config, full, seq_len=S) for S in lengths)
    assert f"{whole / sum(flops):.2f}x by FLOPs" in table


def test_a_layers_share_of_a_short_step():
    """In forwards of one layer at the full length."""
    layer = 8 * 768**2 + 4 * 768 * 3072
    ratio = (layer + 4 * 128 * 768) / (layer + 4 * 512 * 768)
    heads = [head_cost(BERT.model, BERT.data, S) for S in (128, 512)]
    assert heads[0] * ratio == pytest.approx(heads[1])
    stage = Stage(steps=1, depth=6, train_from=3, embeddings="freeze")
    wanted = ratio * step_cost(6, 3, head=heads[0]) / step_cost(12, 0, head=heads[1])
    assert relative_step_cost(BERT, stage, seq_len=128) == pytest.approx(wanted)


def test_the_table_without_it_is_as_ever():
    table = cost_table(mslt(TrainConfig()))
    assert "seq len" not in table and "samples" not in table and len(table.splitlines()) == 8


# Runs


@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
def test_a_run_goes_on_bitwise_over_the_change(shards, tmp_path, quick, objective):
    """The length changes inside the second stage. FLOPs are counted by the length of each step, a stage's time over both of its lengths."""
    config = phased(shards)
    config = mslt(
        replace(config, model=replace(config.model, objective=objective)), MsltOptions(stages=2, stage_weights=(1, 3))
    )
    assert [(s.first, s.last, s.lengths) for s in plan(config)] == [
        (0, 4, ((8, 4),)), (4, 17, ((8, 8), (16, 5))), (17, 20, ((16, 3),))]  # fmt: skip
    straight = assert_goes_on_bitwise(config, tmp_path, (4, 11, 12, 13, 17))
    states = [state_after(straight, step)[1]["state"] for step in range(1, 21)]
    resolved = from_dict(state_after(straight, 20)[1]["config"])
    before, tokens = 0.0, 0
    for step, state in enumerate(states):
        stage = span_at(plan(resolved), step).stage
        spent = flops_per_token(resolved, stage, seq_len=resolved.seq_len(step)) * (state["tokens"] - tokens)
        assert state["flops"] - before == pytest.approx(spent)
        before, tokens = state["flops"], state["tokens"]
    assert states[-1]["tokens"] == pytest.approx(20 * 64, abs=16)
    end = log_of(straight)[-1]
    assert end["event"] == "end"
    unit = step_cost(4, 0, head=head_cost(resolved.model, resolved.data)) * layer_flops(resolved)
    wanted, done, tokens = 0.0, 0, 0
    for point in read_run(straight, "b2").curve:  # between two evaluations each step counts by its own length
        own = [(span_at(plan(resolved), step).stage, resolved.seq_len(step)) for step in range(done, point.step)]
        mean = sum(relative_step_cost(resolved, stage, seq_len=S) for stage, S in own) / len(own)
        wanted += mean * unit * (point.spent.tokens - tokens)
        assert point.spent.flops == pytest.approx(wanted)
        done, tokens = point.step, point.spent.tokens
    assert done == 20


def test_a_stages_time_is_the_mean_over_its_lengths():
    config = mslt(TrainConfig(data=BERT.data, steps=1000))
    state = loop.State(stage_seconds=[[1.0], [1.0, 3.0, 2.0], [4.0], [5.0], [1.0], [9.0, 8.0, 7.0]])
    assert loop.stage_seconds(state, config) == [1.0, 2.0, 4.0, 5.0, (60 * 1.0 + 100 * 8.0) / 160]
    assert loop.stage_seconds(loop.State(stage_seconds=state.stage_seconds[:2]), config) == [1.0, 2.0]
    assert loop.stage_seconds(loop.State(stage_seconds=state.stage_seconds[:5]), config)[-1] == 1.0


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in NEED_SOURCE + NEED_TEACHER])
def test_a_timing_run_has_each_length_where_the_run_has_it(recipe):
    function, options = RECIPES[recipe]

    def make(steps: int) -> TrainConfig:
        return function(replace(BERT, steps=steps, stages=()), options())

    timed = timing_of(make, 30)
    for own, real in zip(plan(timed), plan(make(1000)), strict=True):
        assert [S for S, _ in own.lengths] == [S for S, _ in real.lengths]
        shares = [[n / sum(n for _, n in span.lengths) for _, n in span.lengths] for span in (own, real)]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)
