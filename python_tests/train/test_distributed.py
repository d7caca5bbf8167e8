"""Several ranks are one process whose batches are cut into more parts: the same sums, the same steps, the same run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from train.processes import ranks, store
from train.runs import DATA, log_of, settings, state_after, trained

from stackbert_kernels import cli
from stackbert_kernels.config import ConfigError, ModelConfig, OptimConfig, Stage, TrainConfig, from_dict
from stackbert_kernels.data.batches import Batch, Batches
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import layer_parameters, plan, span_at, trainable_parameters
from stackbert_kernels.recipes import (
    AlbertOptions,
    MsltOptions,
    MultiLevelOptions,
    ProgressiveLayerDroppingOptions,
    ShareThenUnshareOptions,
    StackingOptions,
    albert,
    compound_grow,
    core,
    mslt,
    multi_level,
    progressive_layer_dropping,
    share_then_unshare,
    stacking,
)
from stackbert_kernels.train import checkpoint, distributed, loop, machine
from stackbert_kernels.train.distributed import ALONE, Ranks, row_buckets
from stackbert_kernels.train.run_directory import read_metrics
from stackbert_kernels.train.torchrun import DistributedError, Place, place

DROPOUT_OFF = {"dropout": 0.0, "layers": 4, "hidden": 32, "heads": 2, "max_position": 16}


def small(shards, *, parts=1, dropout=0.0, **changes):
    model = ModelConfig(**DROPOUT_OFF | {"dropout": dropout})
    optim = OptimConfig(lr=1e-2, accumulate=parts)
    return replace(settings(shards, steps=14, checkpoint_every=7, eval_every=7, log_every=1), model=model, optim=optim, stages=(), device="cpu", **changes)  # fmt: skip


RECIPES = {
    "mslt": lambda base: mslt(base, MsltOptions(stages=2, joint=0.2)),
    "mslt, output_grad, by LANS": lambda base: mslt(
        replace(base, optim=replace(base.optim, optimizer="lans")),
        MsltOptions(stages=2, joint=0.2, embeddings="output_grad"),
    ),
    "mslt, untie": lambda base: mslt(base, MsltOptions(stages=2, joint=0.2, embeddings="untie")),
    "stacking, from half": lambda base: stacking(base, StackingOptions(factor=2)),
    "multi_level": lambda base: multi_level(base, MultiLevelOptions()),
    "albert, one half shared": lambda base: albert(base, AlbertOptions(share="ffn", embedding=16)),
    "core": core,
    "compound_grow": compound_grow,
    "share_then_unshare, by gradients": lambda base: share_then_unshare(
        base, ShareThenUnshareOptions(until="split", every=3, below=1.0)
    ),
    "progressive_layer_dropping": lambda base: progressive_layer_dropping(base, ProgressiveLayerDroppingOptions()),
    "submodels": lambda base: replace(
        base, stages=(Stage(steps=6, depth=4), Stage(steps=8, depth=4, submodel=2, embeddings="freeze"))
    ),
}


# Whole runs


def watched_run(config, out):
    """Trains; after each step every parameter, moment and count is compared with rank 0's, bit by bit. Returns the largest difference, and the
    bytes of gradients that each step summed."""
    step, reduce = loop.take_step, dist.all_reduce
    differences, bytes_of = [0.0], []

    def counted(tensor, *arguments, **keywords):
        if (
            tensor.dtype == torch.float32 and tensor.dim() > 0
        ):  # the loss is a scalar, what else is told is float64 or int64
            bytes_of[-1] += tensor.nbytes
        return reduce(tensor, *arguments, **keywords)

    def compared(model, optimizer, *arguments):
        bytes_of.append(0)
        result = step(model, optimizer, *arguments)
        own = (model.bank.weights, *model.always_on_parameters().values(), *optimizer.state_dict().values())
        own = torch.cat([tensor.detach().reshape(-1) for tensor in own])
        first = own.clone()
        dist.broadcast(first, src=0)
        differences[0] = max(differences[0], (own - first).abs().max().item())
        return result

    loop.take_step, dist.all_reduce = compared, counted
    result = loop.train(config, out, progress=False)
    return result["status"], differences[0], bytes_of


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_are_one_process_with_two_parts_bitwise(shards, tmp_path, quick, name):
    """a + b = b + a is all that two ranks and two parts can differ by. The held-out loss is a sum of float64 in another order."""
    two, one = (RECIPES[name](small(shards, parts=parts)) for parts in (1, 2))
    outcomes = ranks(2, watched_run, two, tmp_path / "two", folder=tmp_path / "results")
    assert [(status, difference) for status, difference, _ in outcomes] == [("finished", 0.0)] * 2
    assert trained(one, tmp_path / "one")["status"] == "finished"

    ours, theirs = state_after(tmp_path / "two", 14), state_after(tmp_path / "one", 14)
    for file, named in theirs[0].items():
        assert named.keys() == ours[0][file].keys()
        assert all(torch.equal(tensor, ours[0][file][key]) for key, tensor in named.items())
    ours, theirs = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert [event.pop("ranks") for event in ours if event["event"] == "stage"] == [2] * len(two.stages)
    for mine, alone in zip(ours, theirs, strict=True):
        if "eval_loss" in alone:
            assert mine.pop("eval_loss") == pytest.approx(alone.pop("eval_loss"), rel=1e-14)
        assert mine == alone
    if "gradients" in name:
        assert any(e["event"] == "growth" and "cosines" in e for e in ours)

    if "gradients" not in name:  # there, readings of the gradients are summed too
        ran = from_dict(json.loads((tmp_path / "two" / "config.json").read_text()))  # with the number of words
        assert outcomes[0][2] == outcomes[1][2] == [4 * learning(ran, step) for step in range(14)]


def learning(config: TrainConfig, step: int) -> int:
    """Parameters that learn in a step; those of a layer that it leaves out do not."""
    span = span_at(plan(config), step)
    left_out = sum(gate == 0 for gate in span.gates(step) or ())
    return trainable_parameters(config, span.at(step)) - left_out * layer_parameters(config.model)


@pytest.mark.parametrize(
    ("embeddings", "table"), [("freeze", [46.3, 22.5, 22.5, 22.5]), ("output_grad", [46.3, 45.9, 45.9, 45.9])]
)
def test_what_travels_at_bert_base_is_the_table_of_the_spec(embeddings, table):
    """Millions of parameters, by what a model without storage would hand to all_reduce. All layers: 110.1."""
    shape = ModelConfig(vocab_size=30522, objective="mlm+nsp")
    config = mslt(TrainConfig(model=shape), MsltOptions(embeddings=embeddings))
    model, found = Bert(shape, device="meta"), []
    for stage in config.stages:
        model.use(stage.depth, stage.train_from, stage.embeddings)
        buckets = row_buckets(model)
        assert [row for rows in buckets for row in reversed(range(*rows))] == list(
            reversed(range(stage.train_from, stage.depth))
        )
        count = sum(model.bank.grads[first:last].numel() for first, last in buckets)
        count += sum(p.numel() for p in model.always_on_parameters().values() if p.requires_grad)
        assert count == trainable_parameters(config, stage)
        found.append(round(count / 1e6, 1))
    assert found == [*table, 110.1]


def test_a_few_large_messages():
    """Rows of BERT-base are buckets of their own; small ones go together until there are 25 MB."""
    model = Bert(ModelConfig(vocab_size=64), device="meta")
    assert row_buckets(model) == [(i, i + 1) for i in reversed(range(12))]
    tiny = Bert(ModelConfig(vocab_size=64, layers=24, hidden=256, heads=4), device="meta")
    assert row_buckets(tiny) == [(15, 24), (6, 15), (0, 6)]
    gates = [1.0] * 12
    gates[3] = 0.0
    assert (3, 4) not in row_buckets(model, gates) and len(row_buckets(model, gates)) == 11


def test_rows_travel_while_the_backward_pass_goes_on(monkeypatch):
    """A row leaves once its last gradient is there, topmost first, before those below it have any; the always-on ones after the pass, the
    small together. Gradients are of the same size on all ranks here, twice what one has."""
    sent = []

    class Work:
        def wait(self):
            return True

    def doubled(tensor, async_op=False):
        lowest = next(row for row in range(4) if model.bank.grads[row].any())
        sent.append((list(tensor.shape), lowest, model.position.grad is not None))
        tensor.mul_(2)
        return Work()

    monkeypatch.setattr(dist, "all_reduce", doubled)
    monkeypatch.setattr(distributed, "BUCKET", 1)
    monkeypatch.setattr(distributed, "SMALL", 4 * 50 * 32)
    model = Bert(ModelConfig(**DROPOUT_OFF, vocab_size=60))
    batch = small_batch()
    model(batch).loss.backward()
    wanted = [model.bank.grads.clone(), *(p.grad.clone() for p in model.always_on_parameters().values())]
    model.zero_grad()
    loss = model(batch).loss
    with Ranks(Place(0, 2)).summing(model):
        loss.backward()
    row, small_ones = model.bank.grads.shape[1], sum(w.numel() for w in wanted[1:] if w.numel() < 50 * 32)
    assert sent == [([1, row], lowest, False) for lowest in (3, 2, 1, 0)] + [
        ([60, 32], 0, True),
        ([small_ones], 0, True),
    ]
    for ours, alone in zip(
        [model.bank.grads, *(p.grad for p in model.always_on_parameters().values())], wanted, strict=True
    ):
        assert torch.equal(ours, 2 * alone)
    assert not any(p._post_accumulate_grad_hooks for p in model.bank.parameters())


def small_batch() -> Batch:
    cu = torch.tensor([0, 9, 16], dtype=torch.int32)
    ids, positions = torch.arange(16) + 5, torch.cat([torch.arange(9), torch.arange(7)])
    masked = torch.tensor([2, 5, 12])
    return Batch(ids, torch.zeros(16, dtype=torch.int64), positions, cu, 9, masked, ids[masked], None, torch.arange(2))


# The order of sums


def step_gradients(config, data):
    """Loss and gradients of the first step, of all ranks."""
    with loop.together(config) as those:
        return _first_step(config, data, those)


def _first_step(config, data, those):
    batches = Batches(data, config.data, "mlm", config.seed, rank=those.rank, world_size=those.size)
    model = Bert(replace(config.model, vocab_size=batches.vocab_size), seed=config.seed)
    total, tokens, _ = loop.backward(model, batches.parts(0, config.optim.accumulate), 0, config, None, those)
    return (
        float(total),
        tokens,
        {"bank": model.bank.grads, **{n: p.grad for n, p in model.always_on_parameters().items()}},
    )


def test_gradients_of_four_ranks_are_within_the_bound_of_any_order_of_a_sum(shards, tmp_path):
    """|s' - s| <= g3 (|a| + |b| + |c| + |d|) elementwise, g3 = 3 u / (1 - 3 u), for any order of three additions (Higham, 4.4)."""
    config = small(shards, data=replace(DATA, text=(str(shards),), batch_tokens=128))
    parts = []
    batches = Batches(shards, config.data, "mlm", config.seed)
    shape = replace(config.model, vocab_size=batches.vocab_size)
    cut = batches.parts(0, 4)
    predictions = sum(len(part.masked) for part in cut)
    for part in cut:
        model = Bert(shape, seed=config.seed)
        loss = model(part).mlm_loss * (len(part.masked) / predictions)
        loss.backward()
        grads = {"bank": model.bank.grads, **{n: p.grad for n, p in model.always_on_parameters().items()}}
        parts.append((loss.detach(), grads))
    u = 2.0**-24
    bound = 3 * u / (1 - 3 * u)
    outcomes = ranks(4, step_gradients, config, shards, folder=tmp_path)
    for total, tokens, grads in outcomes:
        assert tokens == sum(part.tokens for part in cut)
        exact = sum(float(loss) for loss, _ in parts)
        assert abs(total - exact) <= bound * exact
        for name, grad in grads.items():
            terms = torch.stack([named[name].double() for _, named in parts])
            assert ((grad.double() - terms.sum(0)).abs() <= bound * terms.abs().sum(0)).all(), name
            assert torch.equal(grad, outcomes[0][2][name])
    assert grads["bank"].abs().max() > 1e-4


def test_the_curve_does_not_hang_on_the_number_of_ranks(shards, tmp_path, quick):
    """Losses of 1, 2 and 4 ranks, beside those of one process whose batches are cut into 2 and 4 parts, which differ from it by the order of sums
    alone, too: within four times the most that this moves a loss of the same run, and a few units in the last place of a mean."""
    data = replace(DATA, text=(str(shards),), batch_tokens=128)

    def losses(out):
        return torch.tensor([e["loss"] for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"])

    curves = []
    for parts in (1, 2, 4):
        trained(RECIPES["mslt"](small(shards, parts=parts, data=data)), tmp_path / f"parts-{parts}")
        curves.append(losses(tmp_path / f"parts-{parts}"))
    alone = curves[0]
    moved = max((curve - alone).abs().max().item() for curve in curves)
    assert 0 < moved < 1e-3
    config = RECIPES["mslt"](small(shards, data=data))
    ranks(4, loop.train, config, tmp_path / "four", folder=tmp_path / "results")
    ulp = torch.finfo(torch.float32).eps * alone.max().item()
    assert (losses(tmp_path / "four") - alone).abs().max() <= 4 * moved + 4 * ulp
    assert alone[-1] < alone[0] - 0.3


# Going on with another number of ranks, signals, skips, failures


def recording_run(config, out, stop_at=None):
    """Trains and returns the result with {step: ids of this rank's samples}; at `stop_at`, the last rank receives a SIGTERM."""
    step, seen = loop.take_step, {}

    def noted(model, optimizer, parts, number, *others):
        seen[number] = [i for part in parts for i in part.sample_ids.tolist()]
        if number == stop_at and os.environ.get("RANK", "0") == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, optimizer, parts, number, *others)

    loop.take_step = noted
    return loop.train(config, out, progress=False), seen


def test_a_run_goes_on_with_another_number_of_ranks(shards, tmp_path, quick):
    """2 ranks until a signal that only one of them receives, then 4, then one process: the samples of each step are those of a run that never
    changed, and its loss is within a thousandth."""
    data = replace(DATA, text=(str(shards),), batch_tokens=128)
    config = RECIPES["mslt"](small(shards, data=data))
    out = tmp_path / "run"
    samples: dict[int, list[int]] = {}
    for size, stop_at in ((2, 4), (4, 8)):
        outcomes = ranks(size, recording_run, config, out, stop_at, folder=tmp_path / "results")
        results = [result for result, _ in outcomes]
        assert {(result["status"], result["step"]) for result in results} == {("stopped", stop_at + 1)}
        assert all("stopped by SIGTERM" in result["message"] for result in results)
        assert checkpoint.latest(out / "checkpoints").name == f"step-{stop_at + 1}"
        for _, seen in outcomes:
            for step, ids in seen.items():
                samples[step] = samples.get(step, []) + ids
    assert trained(config, out)["status"] == "finished"
    batches = Batches(shards, config.data, "mlm", config.seed)
    assert samples == {step: batches[step].sample_ids.tolist() for step in range(9)}
    trained(config, tmp_path / "straight")

    def last(folder):
        return [e["eval_loss"] for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "eval"][-1]

    assert last(out) == pytest.approx(last(tmp_path / "straight"), rel=1e-3)


def run_with_a_bad_loss(config, out):
    """On rank 1 alone, the loss of step 3 is not finite."""
    evaluate = Bert._mlm_loss
    step, skips = loop.take_step, []

    def noted(*arguments):
        number = arguments[3]
        Bert._mlm_loss = lambda *a: evaluate(*a) * (math.inf if number == 3 and os.environ["RANK"] == "1" else 1)
        skips.append(step(*arguments)[2])
        return math.nan, 0.0, skips[-1], 0, None

    loop.take_step = noted
    loop.train(config, out, progress=False)
    return skips


def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(shards, tmp_path):
    config = replace(RECIPES["mslt"](small(shards)), checkpoint_every=1, keep=99)
    outcomes = ranks(2, run_with_a_bad_loss, config, tmp_path / "run", folder=tmp_path / "results")
    assert outcomes == [[step == 3 for step in range(14)]] * 2
    before, after = (state_after(tmp_path / "run", step)[0]["model"] for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)


def failing_run(config, out, how):
    """Fails after step 4, once."""
    step = loop.take_step

    def fails(model, optimizer, parts, number, *others):
        if number == 4 and not (out / "failed").exists() and os.environ["RANK"] == "1":
            (out / "failed").touch()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a broken wire\nin the machine")
        return step(model, optimizer, parts, number, *others)

    loop.take_step = fails
    return loop.train(config, out, progress=False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 failed: RuntimeError: a broken wire$"),
        ("killed", "lost another rank while .*the same command goes on"),
    ],
)
def test_a_rank_that_fails_ends_the_others_with_one_line_and_all_can_be_started_again(shards, tmp_path, how, message):
    """By torchrun --max-restarts, whose store still holds what the first ones wrote."""
    run, kept = (replace(RECIPES["mslt"](small(shards)), checkpoint_every=4), tmp_path / "run"), store()
    outcomes = ranks(2, failing_run, *run, how, folder=tmp_path / "results", kept=kept)
    assert isinstance(outcomes[0], DistributedError)
    with pytest.raises(DistributedError, match=message):
        raise outcomes[0]
    if how == "raises":
        return
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-4"
    again = ranks(2, failing_run, *run, how, folder=tmp_path / "results", kept=kept)
    assert [result["status"] for result in again] == ["finished"] * 2


def refused_run(config, out):
    return loop.train(config, out, progress=False)


def test_what_rank_0_refuses_ends_all(shards, tmp_path):
    config = replace(small(shards), data=replace(DATA, text=(str(tmp_path / "missing"),)))
    outcomes = ranks(2, refused_run, config, tmp_path / "run", folder=tmp_path / "results")
    assert all(isinstance(error, ConfigError) for error in outcomes)
    assert str(outcomes[0]) == str(outcomes[1]) and "missing" in str(outcomes[0])


def unequal_run():
    with distributed.joined(place(), torch.device("cpu")) as those:
        weights = {"bank": torch.ones(3), "word": torch.full((2, 2), float(those.rank == 0))}
        assert those.sums([1.5, those.rank]) == [3.0, 1.0] and those.of_first([those.rank + 7.0]) == [7.0]
        those.require_same({"bank": weights["bank"]}, "here")
        those.require_same(weights, "after step 5")


def test_weights_that_part_are_noticed(tmp_path):
    for error in ranks(2, unequal_run, folder=tmp_path):
        with pytest.raises(DistributedError, match="word is not the same on all 2 ranks after step 5"):
            raise error


# One process


def test_alone_nothing_is_added_up(shards, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    assert trained(small(shards), tmp_path / "run")["status"] == "finished"
    assert ALONE.dropout_seed(5) == 5 and ALONE.sums([2]) == [2] and ALONE.logged == {}


def test_ranks_have_dropout_streams_of_their_own():
    seeds = [Ranks(Place(rank, 4)).dropout_seed(7) for rank in range(4)]
    assert seeds[0] == 7 and len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert not set(seeds[1:]) & {Ranks(Place(rank, 4)).dropout_seed(8) for rank in range(1, 4)}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number >= 1, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number >= 1, got '0'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, which needs RANK, MASTER_ADDR, MASTER_PORT too: start with torchrun, or unset it"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK must be in [0, 2), got 2"),
        ({"WORLD_SIZE": "9", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
         "batch_tokens must be >= seq_len x ranks, so that each has a sample: got batch_tokens 64, seq_len 16, 9 ranks"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "DEVICE": "cuda:1"},
         "device must be auto, cpu or cuda with 2 ranks, got cuda:1: each has its own"),
    ],
)  # fmt: skip
def test_bad_ranks_are_refused_in_one_line(shards, tmp_path, monkeypatch, capsys, environment, message):
    device = environment.get("DEVICE", "cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = ["pretrain", str(shards), "--out", str(tmp_path / "run"), "--seq-len", "16", "--batch-tokens", "64"]
    assert cli.main([*line, "--max-position", "16", "--device", device]) == 2
    assert capsys.readouterr().err == f"stackbert: {message}\n"
    assert not (tmp_path / "run").exists()


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(machine.device_of(d, Place(3, 4, 1, 2))) for d in ("auto", "cuda", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cpu",
    ]
    message = "3 ranks on a machine need as many CUDA devices, torch sees 2: --nproc-per-node 2, or --device cpu"
    for where, error in (
        (Place(0, 6, 0, 3), ConfigError),
        (Place(4, 6, 1, 3), ConfigError),
        (Place(3, 6, 0, 3), DistributedError),
    ):
        with pytest.raises(error, match=message):
            machine.device_of("auto", where)


def test_one_rank_speaks(shards, tmp_path, monkeypatch, capsys):
    """A refusal and a plan are printed once; a sweep is for one process."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    line = ["pretrain", str(shards), "--out", str(tmp_path / "run"), "--dry-run", "--batch-tokens", "256"]
    assert cli.main(line) == 0 and cli.main([*line, "--layers", "0"]) == 2
    monkeypatch.setenv("RANK", "0")
    assert capsys.readouterr() == ("", "")
    assert cli.main(["sweep", "baseline,mslt", str(shards), "--out", str(tmp_path / "sweep"), "--minutes", "1"]) == 2
    assert (
        capsys.readouterr().err == "stackbert: sweep times its runs in one process, got 2: start it without torchrun\n"
    )


@pytest.mark.slow
def test_torchrun(shards, tmp_path):
    line = "--layers 4 --hidden 32 --heads 2 --max-position 16 --seq-len 16 --batch-tokens 64 --steps 12 --threads 1"
    command = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "stackbert_kernels", "pretrain", str(shards)]
    command = [
        sys.executable,
        "-m",
        *command,
        "--out",
        str(tmp_path / "run"),
        *line.split(),
        "--json",
        "--device",
        "cpu",
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["status"] == "finished"
    assert ran.stderr.count("finished:") == 0 and ran.stderr.count("stage 1/5") == 1
    stages = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if e["event"] == "stage"]
    assert len(stages) == 5 and all(e["ranks"] == 2 for e in stages)
