"""The loop: going on is bitwise the same as never having stopped, whatever stopped it; what must not change does not."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from train.runs import assert_same_state, go_back, log_of, settings, state_after, trained

from stackbert_kernels.config import ConfigError, OptimConfig
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.recipes import MsltOptions, baseline, mslt
from stackbert_kernels.train import checkpoint, loop
from stackbert_kernels.train.loop import train
from stackbert_kernels.train.run_directory import Metrics, cut_metrics, locked, open_run, read_metrics


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def two_stages(shards, *, options=MsltOptions(stages=2, joint=0.2), **changes):  # noqa: B008 (frozen)
    """Steps [0, 8) train layers 0-1, [8, 16) layers 2-3, [16, 20) all."""
    return mslt(settings(shards, **changes), options)


# What a run writes


def test_events_and_files_of_a_whole_run(shards, tmp_path):
    out = tmp_path / "run"
    result = trained(two_stages(shards, checkpoint_every=6, keep=2), out)
    assert result["status"] == "finished"
    assert sorted(os.listdir(out)) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "report.png",
    ]
    assert [p.name for p in checkpoint.saved(out / "checkpoints")] == ["step-20", "step-18"]

    events = read_metrics(out / "metrics.jsonl")
    steps = {
        kind: [e["step"] for e in events if e["event"] == kind]
        for kind in ("step", "eval", "checkpoint", "stage", "growth", "end")
    }
    assert steps == {
        "step": [3, 6, 8, 9, 12, 15, 16, 18, 20],
        "eval": [7, 8, 14, 16, 20],
        "checkpoint": [6, 8, 12, 16, 18, 20],
        "stage": [0, 8, 16],
        "growth": [8],
        "end": [20],
    }
    for event in events:
        assert {"step", "stage", "depth", "train_from", "tokens", "flops", "seconds"} <= set(event)
    stages = [e for e in events if e["event"] == "stage"]
    assert [(s["stage"], s["depth"], s["train_from"], s["steps"]) for s in stages] == [
        (0, 2, 0, 8),
        (1, 4, 2, 8),
        (2, 4, 0, 4),
    ]
    assert all(impl in ("native", "triton", "reference") for impl in stages[0]["kernels"].values())
    assert {"attention", "layer_norm", "masked_lm_loss"} <= set(stages[0]["kernels"])
    end = events[-1]
    assert len(end["stage_seconds"]) == 3 and min(end["stage_seconds"]) > 0
    assert 0 < end["eval_loss"] < end["unigram_loss"] + 2 and 0 < end["unigram_accuracy"] < 1
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    assert sum(e["tokens_per_second"] > 0 for e in events if e["event"] == "step") == 9

    transformers = pytest.importorskip("transformers")
    fill = transformers.pipeline("fill-mask", model=str(out / "model"), device="cpu")
    assert fill.model.config.num_hidden_layers == 4
    best = fill("ban bar [MASK] bat don.")
    assert all(set(p) >= {"token_str", "score"} for p in best)

    again = trained(two_stages(shards, checkpoint_every=6, keep=2), out)
    assert again["status"] == "finished" and "already finished" in again["message"]
    assert {k: v for k, v in again.items() if k != "message"} == {k: v for k, v in result.items() if k != "message"}
    (out / "model" / "config.json").unlink()
    (out / "report.html").unlink()
    trained(two_stages(shards, checkpoint_every=6, keep=2), out)
    assert (out / "model" / "config.json").exists() and (out / "report.html").exists()


# Resume


CASES = {
    "freeze": {},
    "untie, accumulated": {
        "options": MsltOptions(stages=2, joint=0.2, embeddings="untie", optimizer_state="zero"),
        "optim": OptimConfig(lr=1e-2, accumulate=3),
    },
    "output_grad, reset, random": {
        "options": MsltOptions(stages=2, joint=0.2, embeddings="output_grad", optimizer_state="reset", init="random"),
    },
    "bf16": {"precision": "bf16"},
    "lamb": {"optim": OptimConfig(lr=1e-2, optimizer="lamb")},
    "lans, constant": {"optim": OptimConfig(lr=1e-2, optimizer="lans", constant=10)},
    "sop": {"objective": "mlm+sop"},
}


@pytest.mark.parametrize("case", CASES)
def test_going_on_is_bitwise_the_same_at_every_step_that_matters(shards, tmp_path, quick, case):
    changes = dict(CASES[case])
    objective = changes.pop("objective", "mlm")
    config = two_stages(shards, **changes)
    config = replace(config, model=replace(config.model, objective=objective))
    straight = tmp_path / "straight"
    trained(config, straight)
    last = state_after(straight, 20)
    log = log_of(straight)
    # first step, mid-interval of the log, before, at and after growth, the joint stage, the last step, after the last
    steps = {"freeze": (1, 5, 7, 8, 9, 16, 19, 20), "lamb": (8, 17), "lans, constant": (8, 17)}
    for step in steps.get(case, (7, 8, 9, 16, 17)):
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(straight, resumed)
        go_back(resumed, step)
        assert trained(config, resumed)["status"] == "finished"
        assert_same_state(state_after(resumed, 20), last)
        assert log_of(resumed) == log


def test_where_checkpoints_are_made_changes_nothing(shards, tmp_path, quick):
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    trained(two_stages(shards), often)
    trained(two_stages(shards, checkpoint_every=100, log_every=5, keep=2), seldom)
    left, right = state_after(often, 20), state_after(seldom, 20)
    left[1].pop("config"), right[1].pop("config")
    assert_same_state(left, right)


def test_accumulation_cuts_the_same_batch(shards, tmp_path, quick):
    """Without dropout, parts give the gradient of the whole batch: the first losses agree to rounding."""
    losses = []
    for accumulate in (1, 4):
        config = settings(shards, steps=4, log_every=1, optim=OptimConfig(lr=1e-3, accumulate=accumulate))
        config = baseline(replace(config, model=replace(config.model, dropout=0.0, attention_dropout=0.0)))
        out = tmp_path / str(accumulate)
        trained(config, out)
        losses.append([e["loss"] for e in log_of(out) if e["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# What must not change


def test_one_stage_without_joint_training_is_the_baseline_bit_for_bit(shards, tmp_path, quick):
    plain, stacked = tmp_path / "baseline", tmp_path / "mslt"
    trained(baseline(settings(shards, log_every=1)), plain)
    trained(mslt(settings(shards, log_every=1), MsltOptions(stages=1, joint=0.0)), stacked)
    losses = [[(e["step"], e["loss"]) for e in log_of(out) if e["event"] == "step"] for out in (plain, stacked)]
    assert len(losses[0]) == 20 and losses[0] == losses[1]
    left, right = state_after(plain, 20), state_after(stacked, 20)
    left[1].pop("config"), right[1].pop("config")
    assert_same_state(left, right)


def test_frozen_layers_and_embeddings_stay_bit_for_bit(shards, tmp_path, quick):
    out = tmp_path / "run"
    trained(two_stages(shards), out)
    before, after = state_after(out, 8)[0], state_after(out, 16)[0]
    assert torch.equal(before["model"]["bank"][:2], after["model"]["bank"][:2])
    for name in ("word", "position", "token_type", "embedding_norm.weight", "embedding_norm.bias"):
        assert torch.equal(before["model"][name], after["model"][name]), name
        assert not torch.equal(state_after(out, 7)[0]["model"][name], before["model"][name]), (
            f"{name} did not learn before"
        )
    for name, tensor in before["optimizer"].items():
        if name.startswith(("bank.layers.0.", "bank.layers.1.", "word", "position", "token_type", "embedding_norm")):
            assert torch.equal(tensor, after["optimizer"][name]), name
    assert not torch.equal(before["model"]["bank"][2:], after["model"]["bank"][2:])


def test_the_log_says_how_far_the_input_of_frozen_layers_has_gone(shards, tmp_path, quick):
    out = tmp_path / "run"
    trained(two_stages(shards, options=MsltOptions(stages=2, joint=0.2, embeddings="output_grad")), out)
    drift = {e["step"]: e.get("word_drift") for e in log_of(out) if e["event"] == "eval"}
    before = state_after(out, 8)[0]["model"]["word"]
    for step in (14, 16):  # of the stage with frozen layers; 7, 8 and 20 have none
        after = state_after(out, step)[0]["model"]["word"]
        assert drift.pop(step) == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert drift == {7: None, 8: None, 20: None}


def test_a_checkpoint_without_what_the_drift_is_counted_from_is_refused(shards, tmp_path, quick):
    out = tmp_path / "run"
    config = two_stages(shards, options=MsltOptions(stages=2, joint=0.2, embeddings="output_grad"))
    trained(config, out)
    go_back(out, 12)
    tensors, documents = checkpoint.load(out / "checkpoints" / "step-12")
    tensors.pop("before")
    shutil.rmtree(out / "checkpoints" / "step-12")
    checkpoint.save(out / "checkpoints", 12, tensors, documents, keep=99)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-12: word must be \[\d+, 32\], got None"):
        trained(config, out)


def test_grown_layers_begin_as_copies(shards, tmp_path, quick, monkeypatch):
    seen = []

    def remember(model, optimizer, span):
        use(model, optimizer, span)
        seen.append((span.index, model.bank.weights.clone(), optimizer.exp_avg.clone(), optimizer.steps.clone()))

    use = loop.use
    monkeypatch.setattr(loop, "use", remember)
    trained(two_stages(shards), tmp_path / "run")
    _, weights, exp_avg, steps = seen[1]
    assert torch.equal(weights[2:], weights[:2])
    assert torch.equal(exp_avg[2:], exp_avg[:2]) and exp_avg[2:].abs().sum() > 0
    assert steps.tolist() == [8, 8, 8, 8]


# Steps that are not finite


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of the calls in `calls` NaN, or inf."""
    calls, count, clean = {}, [0], Bert._mlm_loss

    def loss(model, hidden, labels):
        count[0] += 1
        return clean(model, hidden, labels) * calls.get(count[0] - 1, 1.0)

    monkeypatch.setattr(Bert, "_mlm_loss", loss)
    return calls


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_parameter(shards, tmp_path, quick, poison, value):
    poison |= {5: value, 12: value}
    out = tmp_path / "run"
    result = trained(two_stages(shards, log_every=1), out)
    assert result["status"] == "finished" and result["skipped"] == 2
    for step in (5, 12):
        before, after = state_after(out, step), state_after(out, step + 1)
        assert all(torch.equal(t, after[0]["model"][n]) for n, t in before[0]["model"].items())
        assert all(
            torch.equal(t, after[0]["optimizer"][n]) for n, t in before[0]["optimizer"].items() if n != "skipped"
        )
        event = next(e for e in log_of(out) if e["event"] == "step" and e["step"] == step + 1)
        assert event["loss"] is None and event["skipped"] == 1
    assert not torch.equal(state_after(out, 6)[0]["model"]["bank"], state_after(out, 7)[0]["model"]["bank"])


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(shards, tmp_path, quick, poison):
    poison |= dict.fromkeys(range(9, 13), float("nan"))
    out = tmp_path / "run"
    config = two_stages(shards, checkpoint_every=100, optim=OptimConfig(lr=1e-2, skip_limit=3))
    result = trained(config, out)
    assert result["status"] == "failed" and result["step"] == 12
    assert "stopped at step 12: 3 steps in a row" in result["message"] and "\n" not in result["message"]
    assert [p.name for p in checkpoint.saved(out / "checkpoints")] == ["step-12", "step-8"]
    poison.clear()
    assert trained(config, out)["status"] == "finished"


# Signals, kills, damage


def run_in_child(config, out):
    torch.set_num_threads(1)
    loop.write_report, loop.exportable = (lambda directory: None), (lambda run, console: False)
    os._exit(0 if train(config, out, progress=False)["status"] in ("finished", "stopped") else 1)


@pytest.fixture(scope="module")
def children():
    """A server that has imported everything and run nothing forks the children: each starts at once, whatever this process did."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stackbert_kernels.train.loop", "safetensors.torch"])
    return context


def wait_for(event, out, process, step):
    deadline = time.monotonic() + 60
    while not any(e["event"] == event and e["step"] >= step for e in read_metrics(out / "metrics.jsonl")):
        assert process.is_alive(), f"the child ended before {event} {step}"
        assert time.monotonic() < deadline, f"no {event} {step} within a minute"
        time.sleep(0.002)


def test_a_killed_run_ends_as_a_straight_one_and_its_log_has_no_gap_or_duplicate(shards, tmp_path, quick, children):
    config = two_stages(shards, steps=60, checkpoint_every=4, log_every=2, keep=2)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    trained(config, straight)
    choose = random.Random(0)
    for step in (1, 12, 26, 40, 50):
        process = children.Process(target=run_in_child, args=(config, killed), daemon=True)
        process.start()
        wait_for("step", killed, process, step)
        time.sleep(choose.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        newest = checkpoint.latest(killed / "checkpoints", warn=pytest.fail)
        assert newest is not None or step == 1
    assert trained(config, killed)["status"] == "finished"
    assert_same_state(state_after(killed, 60), state_after(straight, 60))
    assert log_of(killed) == log_of(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_well(shards, tmp_path, quick, children, number):
    config = two_stages(shards, steps=900, checkpoint_every=10_000, log_every=1, keep=2, eval_every=10_000)
    out = tmp_path / "run"
    process = children.Process(target=run_in_child, args=(config, out), daemon=True)
    process.start()
    wait_for("step", out, process, 3)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    events = read_metrics(out / "metrics.jsonl")
    done = events[-1]["step"]
    assert 3 <= done < 900
    assert [e["event"] for e in events[-2:]] == ["step", "checkpoint"]
    assert checkpoint.latest(out / "checkpoints").name == f"step-{done}"


def test_a_stop_says_how_to_go_on(shards, tmp_path, quick, monkeypatch):
    step = loop.take_step

    def interrupted(model, optimizer, parts, number, *others):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, optimizer, parts, number, *others)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "take_step", interrupted)
    result = trained(two_stages(shards, checkpoint_every=100), tmp_path / "run")
    assert result["status"] == "stopped" and result["step"] == 5
    assert "stopped by SIGTERM after step 5 of 20, saved in" in result["message"]
    assert result["message"].endswith("the same command goes on from there")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_damaged_checkpoint_is_passed_over(shards, tmp_path, quick, capsys):
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    trained(two_stages(shards), straight)
    shutil.copytree(straight, damaged)
    go_back(damaged, 10)
    with open(damaged / "checkpoints" / "step-10" / "model.safetensors", "r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    train(two_stages(shards), damaged)
    assert "step-10 is damaged and not used: model.safetensors" in capsys.readouterr().err
    assert_same_state(state_after(damaged, 20), state_after(straight, 20))
    assert log_of(damaged) == log_of(straight)


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(shards, tmp_path, quick):
    out = tmp_path / "run"
    config = two_stages(shards, checkpoint_every=10, keep=2)
    trained(config, out)
    go_back(out, 20)
    for path in checkpoint.saved(out / "checkpoints"):
        (path / "state.json").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* is whole"):
        trained(config, out)
    assert (out / "metrics.jsonl").read_bytes() == before
    assert len(checkpoint.saved(out / "checkpoints")) == 2


def test_a_full_disk_stops_the_run_and_loses_nothing(shards, tmp_path, quick, monkeypatch):
    out, save = tmp_path / "run", checkpoint.save

    def full(directory, step, *arguments, **keywords):
        if step == 12:
            raise checkpoint.CheckpointError("the checkpoint of step 12 could not be written: No space left on device")
        return save(directory, step, *arguments, **keywords)

    config = two_stages(shards, checkpoint_every=6)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(checkpoint.CheckpointError, match="No space left"):
            trained(config, out)
    assert checkpoint.latest(out / "checkpoints").name == "step-8"
    assert trained(config, out)["status"] == "finished"


# Refusals


def test_another_configuration_is_refused_with_what_differs(shards, tmp_path, quick):
    out = tmp_path / "run"
    trained(two_stages(shards), out)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run of another configuration: lr: 0.01 -> 0.02 .*--fresh"):
        trained(two_stages(shards, optim=OptimConfig(lr=2e-2)), out)
    assert (out / "metrics.jsonl").read_bytes() == before
    (out / "mine.txt").write_text("notes")
    result = trained(two_stages(shards, optim=OptimConfig(lr=2e-2)), out, fresh=True)
    assert result["status"] == "finished" and "already" not in result["message"]
    assert (out / "mine.txt").read_text() == "notes"
    assert (out / "metrics.jsonl").read_bytes() != before


def test_a_checkpoint_of_another_run_is_refused(shards, tmp_path, quick):
    one, two = tmp_path / "one", tmp_path / "two"
    trained(two_stages(shards), one)
    trained(two_stages(shards, seed=1), two)
    go_back(one, 10)
    shutil.rmtree(one / "checkpoints" / "step-10")
    shutil.copytree(two / "checkpoints" / "step-10", one / "checkpoints" / "step-10")
    with pytest.raises(ConfigError, match=r"step-10 is of another configuration: seed: 1 -> 0"):
        trained(two_stages(shards), one)


def test_a_directory_of_something_else_is_refused(shards, tmp_path, quick):
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=r"new, empty or a run directory, got .* with thesis.tex"):
            trained(two_stages(shards), tmp_path, fresh=fresh)
    with pytest.raises(ConfigError, match="must be a directory, got a file"):
        trained(two_stages(shards), tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_cannot_run_is_refused(shards, tmp_path, quick):
    with pytest.raises(ConfigError, match=r"vocab_size must be the tokenizer's \d+ .* got vocab_size 77"):
        config = two_stages(shards)
        trained(replace(config, model=replace(config.model, vocab_size=77)), tmp_path / "vocab")
    with pytest.raises(ConfigError, match=r"impl: .*'triton' cannot run here"):
        trained(two_stages(shards, impl="triton"), tmp_path / "impl")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device must be one that torch can use, got cuda"):
            trained(two_stages(shards, device="cuda"), tmp_path / "device")


def test_two_processes_cannot_train_in_one_directory(shards, tmp_path, quick):
    config = two_stages(shards)
    run = open_run(config, tmp_path / "run", progress=False)
    with locked(run.checkpoints), pytest.raises(ConfigError, match="another process is training in "):
        loop.execute(run, progress=False)
    assert loop.execute(run, progress=False)["status"] == "finished"


# The log


def test_cutting_the_log_keeps_what_the_checkpoint_knows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for event, step in (
        ("stage", 0),
        ("step", 2),
        ("checkpoint", 2),
        ("step", 4),
        ("checkpoint", 4),
        ("growth", 4),
        ("step", 6),
    ):
        metrics.append(event, step=step, loss=float("nan"))
    metrics.close()
    whole = path.read_text()
    assert '"loss": null' in whole
    path.write_text(whole[:-5])
    assert cut_metrics(path, 4) is True
    assert [(e["event"], e["step"]) for e in read_metrics(path)][-2:] == [("step", 4), ("checkpoint", 4)]
    assert cut_metrics(path, 3) is False
    assert [(e["event"], e["step"]) for e in read_metrics(path)] == [("stage", 0), ("step", 2), ("checkpoint", 2)]
    assert cut_metrics(path, None) is False
    assert path.read_text() == ""


def test_what_cannot_become_a_model_of_transformers_is_said_before_the_first_step(
    shards, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("transformers")
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    config = settings(shards, steps=2, checkpoint_every=2, eval_every=2)
    config = replace(config, model=replace(config.model, norm="pre", embedding=8), stages=())
    out = tmp_path / "run"
    assert train(config, out)["status"] == "finished"
    lines = capsys.readouterr().err.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith(f"no {out / 'model'}: transformers' pre-LN model")]
    first = next(i for i, line in enumerate(lines) if line.startswith("stage 1/1"))
    assert len(said) == 2 and said[0] < first < said[1]
