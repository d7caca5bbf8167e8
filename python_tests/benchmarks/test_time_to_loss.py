"""The time-to-loss benchmark: everyone sees the same batches, what is read off the curves is right, and one that fails stops no other."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_time_to_loss, results_file
from benchmarks.__main__ import main
from benchmarks.bench_time_to_loss import HF, Contest, Preset, loss_at, seconds_to, steps_that_fit
from benchmarks.training_step import parameter_flops
from stackbert_kernels.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.data.batches import Batches, heldout
from stackbert_kernels.data.prepare import load_manifest, prepare
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.model.hf import from_transformers
from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.train import loop

TINY = TrainConfig(
    model=ModelConfig(layers=4, hidden=16, heads=2, max_position=16, dropout=0.0),
    data=DataConfig(train_vocab_size=80, seq_len=16, batch_tokens=64, heldout=0.1, eval_tokens=128),
    optim=OptimConfig(lr=1e-3),
    device="cpu",
    threads=1,
)
PRESET = Preset(minutes=1, aside=1, config=TINY, warmup=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0)
    lines = (" ".join(words.choices("abc acb bac bca cab cba".split(), k=12)) + "." for _ in range(300))  # noqa: SIM905
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def data(text):
    return prepare([str(text)], text.parent / "data", TINY.data, progress=False)


@pytest.fixture
def contest(data, tmp_path):
    model = replace(TINY.model, vocab_size=load_manifest(data)["vocab_size"])
    base = replace(TINY, model=model, data=replace(TINY.data, text=(str(data),)))
    return Contest(base, PRESET, data, tmp_path, seconds=1.0)


# What is read off a curve


CURVE = [{"seconds": s, "loss": loss} for s, loss in ((1.0, 8.0), (2.0, 6.0), (4.0, 7.0), (6.0, 4.0))]


@pytest.mark.parametrize(
    ("seconds", "loss"), [(0.5, None), (1.0, 8.0), (1.5, 7.0), (3.0, 6.5), (5.0, 5.5), (6.0, 4.0), (9.0, 4.0)]
)
def test_loss_at(seconds, loss):
    assert loss_at(CURVE, seconds) == loss


@pytest.mark.parametrize(
    ("loss", "seconds"), [(9.0, 1.0), (8.0, 1.0), (7.0, 1.5), (6.0, 2.0), (5.5, 5.0), (4.0, 6.0), (3.9, None)]
)
def test_seconds_to(loss, seconds):
    assert seconds_to(CURVE, loss) == seconds


def test_the_target_is_the_loss_of_the_transformers_loop():
    def row(case, curve):
        return {"case": case, "curve": [point | {"accuracy": 0.1, "tokens": 5, "flops": 2.0} for point in curve]}

    slow = [{"seconds": 4.0, "loss": 9.0}, {"seconds": 8.0, "loss": 6.0}]
    result = {"settings": {"seconds": 8.0}, "rows": [row("baseline", CURVE), row(HF, slow)]}
    bench_time_to_loss.summarize(result)
    ours, theirs = result["rows"]
    assert result["target"] == {"contender": HF, "loss": 6.0}
    assert (ours["seconds_to_target"], theirs["seconds_to_target"]) == (2.0, 8.0)
    assert theirs["loss_at"] == {"25%": None, "50%": 9.0, "75%": 7.5}
    assert (ours["loss"], ours["train_seconds"], ours["tokens"], ours["flops"]) == (4.0, 6.0, 5, 2.0)
    bench_time_to_loss.summarize(result := result | {"rows": [ours]})
    assert result["target"] == {"contender": "baseline", "loss": 4.0}


# Steps that fit


def test_steps_fill_the_budget_and_no_more(contest):
    contest = replace(contest, seconds=10.0)
    each = [0.01, 0.02, 0.03, 0.04, 0.08]

    def seconds(steps):
        return sum(s.steps * t for s, t in zip(contest.recipe("mslt", steps).stages, each, strict=True))

    steps = steps_that_fit(contest, "mslt", each)
    assert seconds(steps) <= 10.0 < seconds(steps + 2)  # whole steps of a dear stage: one more may or may not fit
    assert steps_that_fit(contest, "baseline", [0.1]) == 100


@pytest.mark.parametrize("steps", [50, 5000])
def test_the_schedule_is_laid_over_the_steps(contest, steps):
    for name in RECIPES:
        config = contest.recipe(name, steps)
        assert (config.steps, config.optim.warmup) == (steps, steps // 10)
        assert config.seed == contest.base.seed and replace(config.data, max_ngram=1) == contest.base.data
    assert 18 <= steps / contest.of_steps(steps).eval_every <= 25


# The loop around transformers


@pytest.fixture
def transformers_loop(contest):
    pytest.importorskip("transformers")
    from benchmarks.transformers_loop import Loop

    return Loop(contest.of_steps(6), contest.data, "cpu")


def test_it_computes_the_loss_of_our_model_on_the_same_batches(transformers_loop, contest):
    from benchmarks.transformers_loop import padded

    base = contest.base
    ours = Bert(base.model, seed=base.seed)
    assert len(transformers_loop.batches[3].input_ids) and transformers_loop.config.seed == base.seed
    for step in (0, 3):
        mine = Batches(contest.data, base.data, "mlm", base.seed)[step]
        theirs = padded(transformers_loop.batches[step])
        torch.testing.assert_close(
            transformers_loop.model(**theirs).loss, ours(mine).loss
        )  # float32: torch's own tolerance
        assert int(theirs["attention_mask"].sum()) == mine.tokens
        assert torch.equal(theirs["input_ids"][theirs["attention_mask"].bool()], mine.input_ids)


def test_it_evaluates_as_our_trainer_does(transformers_loop, contest):
    ours = from_transformers(transformers_loop.model).eval()
    batches = heldout(contest.data, contest.base.data, "mlm", contest.base.seed)
    loss, right, count = (sum(float(f[i]) for f in map(ours.evaluate, batches)) for i in range(3))
    found = transformers_loop.evaluate()
    assert found["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert found["eval_accuracy"] == right / count
    assert transformers_loop.model.training


def test_its_flops_are_those_of_a_counter(contest):
    """Padding and all logits, against torch's count of eager attention's products."""
    pytest.importorskip("transformers")
    from benchmarks.transformers_loop import Loop, padded

    loop = Loop(contest.of_steps(6), contest.data, "cpu")
    loop.model.set_attn_implementation("eager")
    batch = loop.batches[0]
    with FlopCounterMode(display=False) as counter:
        loop.model(**padded(batch)).loss.backward()
    size = batch.sequences * batch.max_seqlen
    assert parameter_flops(contest.base.model, batch.max_seqlen) * size == counter.get_total_flops()


def test_it_learns_and_logs(transformers_loop, tmp_path):
    transformers_loop.train(tmp_path / "log.jsonl")
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "eval"] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    for name in ("seconds", "tokens", "flops"):
        values = [event[name] for event in events if event["event"] == "eval"]
        assert values == sorted(values) and values[0] > 0
    assert events[-1]["tokens"] == sum(transformers_loop.batches[step].tokens for step in range(6))
    assert events[-1]["eval_loss"] < events[1]["eval_loss"]


def test_evaluation_is_not_in_its_seconds(transformers_loop, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.transformers_loop.time.perf_counter", lambda: now[0])

    def takes(seconds, result):
        def call(*_):
            now[0] += seconds
            return result

        return call

    monkeypatch.setattr(transformers_loop, "step", takes(1.0, torch.tensor(2.0)))
    monkeypatch.setattr(transformers_loop, "evaluate", takes(100.0, {"eval_loss": 1.0, "eval_accuracy": 0.0}))
    transformers_loop.train(tmp_path / "log.jsonl")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] == 6.0


# Contenders


def short(monkeypatch):
    """Small models, and few steps whatever the clock says."""
    monkeypatch.setattr(bench_time_to_loss, "PRESETS", dict.fromkeys(("cpu", "cuda"), PRESET))
    monkeypatch.setattr(bench_time_to_loss, "steps_that_fit", lambda *_: 20)
    monkeypatch.setattr(bench_time_to_loss, "TIMED_STEPS", 2)


def test_the_command(text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    short(monkeypatch)
    assert main(["time_to_loss", str(text), "--device=cpu", "--seconds=1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    result = results_file.read(tmp_path / "time_to_loss.json")
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == [HF, *bench_time_to_loss.BY_DEFAULT]
    assert result["absent"] == {} and result["problems"] == []
    assert result["target"] == {"contender": HF, "loss": rows[HF]["loss"]}
    for name, row in rows.items():
        assert set(row["loss_at"]) == {"25%", "50%", "75%"} and row["curve"][-1]["step"] == row["steps"]
        assert row["train_seconds"] > 0 and row["tokens"] > 0 and row["flops"] > 0
        assert name in printed
    assert rows["baseline"]["tokens"] == rows["mslt"]["tokens"] and rows["baseline"]["flops"] > rows["mslt"]["flops"]
    assert [len(row["timed_seconds_per_step"]) for row in rows.values()][:3] == [1, 1, 5]
    assert (tmp_path / "time_to_loss.png").read_bytes().startswith(b"\x89PNG")
    assert result["settings"]["seconds"] == 1 and result["settings"]["train_tokens"] > 0


def test_without_transformers_it_is_named(text, tmp_path, monkeypatch, capsys):
    short(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(loop, "exportable", lambda *_: False)
    asked = ["--contenders", "hf", "baseline"]
    assert main(["time_to_loss", str(text), "--device=cpu", "--seconds=1", "--out", str(tmp_path), *asked]) == 0
    result = results_file.read(tmp_path / "time_to_loss.json")
    assert list(result["absent"]) == [HF] and [row["case"] for row in result["rows"]] == ["baseline"]
    assert result["target"]["contender"] == "baseline"
    assert f"{HF} absent: " in capsys.readouterr().out


@pytest.mark.parametrize("failure", [RuntimeError("planted"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_what_has_finished_counts(text, tmp_path, monkeypatch, capsys, failure):
    short(monkeypatch)
    run = bench_time_to_loss.run_recipe

    def fails(contest, name):
        if name == "mslt":
            raise failure
        return run(contest, name)

    monkeypatch.setattr(bench_time_to_loss, "run_recipe", fails)
    asked = ["--contenders", "baseline", "mslt"]
    assert main(["time_to_loss", str(text), "--device=cpu", "--seconds=1", "--out", str(tmp_path), *asked]) == 1
    printed = capsys.readouterr()
    result = results_file.read(tmp_path / "time_to_loss.json")
    assert [row["case"] for row in result["rows"]] == ["baseline"] and "baseline" in printed.out
    if isinstance(failure, RuntimeError):
        assert result["problems"] == ["mslt: RuntimeError: planted"] and "planted" in printed.out
    else:
        assert printed.err.endswith("python -m benchmarks time_to_loss: interrupted\n")


def test_a_budget_with_room_for_few_steps_is_a_problem(contest):
    with pytest.raises(ValueError, match="1 s have room for 19 steps, wanted at least 20"):
        contest.enough(19)
    assert contest.enough(20) == 20


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--seconds", "0.5"], "--seconds must be at least 1, got 0.5"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--minutes", "0.1"], "--minutes must be at least 0."),
        (["--minutes", "5", "--seconds", "5"], "argument --seconds: not allowed with argument --minutes"),
        (["--contenders", "nobody"], "argument --contenders: invalid choice: 'nobody'"),
        (["--heads", "3"], "hidden must be divisible by heads, got hidden 128, heads 3"),
        (["/no/such/text.txt"], "text: no such file, directory or glob: /no/such/text.txt"),
        (["--lr", "-1"], "lr must be > 0"),
    ],
)
def test_bad_use_is_one_line(arguments, line, capsys):
    assert main(["time_to_loss", "--device", "cpu", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"python -m benchmarks time_to_loss: {line}")


def test_the_presets_make_plans():
    for preset in bench_time_to_loss.PRESETS.values():
        base = replace(preset.config, model=replace(preset.config.model, vocab_size=100))
        for name in RECIPES:
            assert Contest(base, preset, None, None, 60.0).recipe(name, 1000).steps == 1000
