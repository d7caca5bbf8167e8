"""What a sweep does before its runs are compared: it finds the rate of each method, and makes the models that methods need."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace

import pytest

from stackbert_kernels import sweep as sweeps
from stackbert_kernels.cli import main
from stackbert_kernels.config import DataConfig, ModelConfig, TrainConfig
from stackbert_kernels.sweep import settings as sweep_settings
from stackbert_kernels.sweep import work as working
from stackbert_kernels.sweep.record import Trial, Tuned
from stackbert_kernels.sweep.settings import Sweep, Timing, half_size
from stackbert_kernels.sweep.tuning import at_edge
from stackbert_kernels.train import loop
from stackbert_kernels.train.run_directory import read_metrics

SMALL = (
    "--layers 2 --hidden 16 --heads 2 --seq-len 16 --max-position 16 --batch-tokens 64 --train-vocab-size 80 --heldout 0.1 "
    "--eval-tokens 128 --threads 1 --device cpu"
)
LINE = f"sweep baseline,mslt text.txt --out out --minutes 0.4 --seeds 1 {SMALL} --mslt.stages 2"
TUNED = f"{LINE} --lr mslt=2e-3 --tune 1e-3 1e-2 1e30"
STEPS = 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with text.txt; a run takes 20 steps, whatever the clock says, and a trial as many as its seconds."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    lines = (" ".join(words.choices("abc acb bac bca cab cba".split(), k=12)) + "." for _ in range(200))  # noqa: SIM905
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda recipe, each, seconds: STEPS if seconds > 20 else 25)
    monkeypatch.setattr(working, "TIMED_STEPS", 2)
    monkeypatch.setattr(working, "TIMING_SHARE", 0.0)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(loop, "exportable", lambda run, _: "sources" in run.directory.parts)
    return tmp_path


def run(line, capsys):
    code = main(line.split())
    return code, *capsys.readouterr()


def recorded(folder) -> dict:
    return json.loads((folder / "out" / "sweep.json").read_text())


def test_each_method_runs_at_its_best_rate(folder, monkeypatch, capsys):
    """Stopped in the second trial, the same command makes the others; the rate at which nothing is learned is a finding."""
    code, out, _ = run(TUNED + " --dry-run", capsys)
    plan = out.splitlines()
    assert code == 0 and plan[1].split()[:2] == ["baseline", "tuned"] and plan[2].split()[:2] == ["mslt", "0.002"]
    assert plan[3].startswith(
        "tuning: 3 runs of 0.1 minutes, 0 of them made, at rates 0.001 0.01 1e+30: 18.0 s more, which no"
    )
    assert (
        plan[4]
        == "2 runs, 0 of them finished: 48.0 s of training, about 1 min 13 s with evaluation, checkpoints and tuning"
    )

    step, calls = loop.take_step, []
    with monkeypatch.context() as patch:

        def interrupts(*arguments):
            calls.append(0)
            if (
                len(calls) == 2 + 3 * 2 + 25 + 5
            ):  # two stages timed in one, three in the other; a trial; five steps of the next
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        patch.setattr(loop, "take_step", interrupts)
        code, _, err = run(TUNED, capsys)
    assert code == 1 and "[tuning 2/3] baseline at 0.01: stopped by SIGTERM after step 5 of 25" in err, err
    assert [trial["lr"] for trial in recorded(folder)["tuning"]["baseline"]["tried"]] == [1e-3]
    assert recorded(folder)["tuning"]["baseline"]["lr"] is None

    code, out, err = run(TUNED, capsys)
    assert code == 0 and "timing" not in err and "[tuning 1/3]" not in err, err
    assert "[tuning 3/3] baseline at 1e+30: diverged: stopped at step 1" in err
    tuned = recorded(folder)["tuning"]
    losses = {trial["lr"]: trial["loss"] for trial in tuned["baseline"]["tried"]}
    assert list(tuned) == ["baseline"] and losses[1e30] is None and losses[1e-2] < losses[1e-3]
    assert (
        tuned["baseline"]["lr"] == 1e-2 and "baseline: rate 0.01, but at none did it get below the loss without" in err
    )
    assert tuned["baseline"]["tried"][0]["steps"] == 25 and tuned["baseline"]["seconds"] == pytest.approx(6.0)
    assert not any((folder / "out" / "tuning" / "baseline-lr0.01" / part).exists() for part in ("checkpoints", "model"))
    rates = {m: max(e["lr"] for e in read_metrics(folder / "out" / f"{m}-seed0" / "metrics.jsonl") if e["event"] == "step") for m in ("baseline", "mslt")}  # fmt: skip
    assert rates["baseline"] == 1e-2 and 1e-3 < rates["mslt"] <= 2e-3
    assert "! baseline: diverged at rate 1e+30 when it was tuned" in out and "  rate  " in out
    assert "! baseline: no trial of a rate got below the loss without context, so its rate 0.01 says little" in out
    assert all(trial["loss"] > trial["unigram"] > 0 for trial in tuned["baseline"]["tried"] if trial["loss"])
    compared = {m["name"]: m for m in json.loads((folder / "out" / "compare.json").read_text())["methods"]}
    assert compared["baseline"]["tuning"]["tried"] == tuned["baseline"]["tried"] and compared["mslt"]["tuning"] is None
    assert (compared["baseline"]["lr"], compared["mslt"]["lr"]) == (1e-2, 2e-3)

    # Nothing is left to do; other rates, or none, are another sweep.
    code, _, err = run(TUNED, capsys)
    assert code == 0 and err.count("finished before") == 2
    code, out, _ = run(TUNED + " --dry-run", capsys)
    assert out.splitlines()[1].split()[:3] == ["baseline", "0.01", "(tuned)"] and "3 of them made" in out
    for line, said in (
        (
            TUNED.replace("1e30", "3e-2"),
            "out tuned baseline with --tune 0.001 0.01 1e+30 of 0.1 minutes and seed 0, wanted --tune 0.001",
        ),
        (f"{TUNED} --tune-minutes 0.2", "wanted --tune 0.001 0.01 1e+30 of 0.2 minutes and seed 0"),
        (f"{LINE} --lr mslt=2e-3", "out holds baseline with other settings: lr: 0.01 -> 0.0001"),
        (
            TUNED.replace("mslt=2e-3", "mslt=2e-3 baseline=2e-3"),
            "out holds baseline with other settings: lr: 0.01 -> 0.002",
        ),
        (TUNED.replace("--lr mslt=2e-3", ""), "out holds runs of mslt whose rate was not tuned"),
    ):
        code, _, err = run(line, capsys)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_trial_that_breaks_leaves_out_its_method(folder, monkeypatch, capsys):
    """The others' runs are made; the same command makes that trial again, and then the runs."""
    train, line = loop.train, f"{LINE} --lr mslt=2e-3 --tune 1e-3 1e-2"

    def breaks(config, out, **options):
        if out.name == "baseline-lr0.01":
            raise RuntimeError("no room")
        return train(config, out, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", breaks)
        code, _, err = run(line, capsys)
    assert code == 1 and "[tuning 2/2] baseline at 0.01: RuntimeError: no room\n" in err
    assert "baseline: a trial has no result, so its runs are left out" in err and "mslt seed 0: held-out loss" in err
    assert err.endswith("stackbert: 1 of the runs failed: out/baseline-seed0\n")
    code, _, err = run(line, capsys)
    assert code == 0 and "[tuning 1/2]" not in err and "[tuning 2/2] baseline at 0.01: held-out" in err, err


def test_the_best_rate_and_the_edge_of_what_was_tried():
    def tuned(*losses) -> Tuned:
        rates = tuple(10.0**i for i in range(len(losses)))
        found = Tuned(rates, 60.0, 0)
        for rate, loss in zip(rates, losses, strict=True):
            assert found.lr is None
            found = found.with_trial(Trial(rate, 100, loss, 60.0))
        return found

    assert tuned(3.0, 2.0, 2.5).lr == 10.0 and at_edge(tuned(3.0, 2.0, 2.5)) == ""
    assert tuned(2.0, 2.0, None).lr == 1.0 and "lowest of those tried: a lower one may be better" in at_edge(
        tuned(2.0, 2.5, None)
    )
    assert tuned(None, None, 4.0).lr == 100.0 and "the highest of those tried" in at_edge(tuned(3.0, 2.0, 1.0))
    assert (
        tuned(None, None).lr == 1.0 and at_edge(tuned(None, None)) == ", the lowest of those tried, which all diverged"
    )
    stuck = Tuned((1.0, 2.0, 4.0), 60.0, 0)
    for rate, loss in ((1.0, 6.43), (2.0, 6.4), (4.0, None)):
        stuck = stuck.with_trial(Trial(rate, 100, loss, 60.0, 6.4))
    assert stuck.lr == 2.0 and "at none did it get below the loss without context" in at_edge(stuck)
    assert at_edge(replace(stuck, tried=(*stuck.tried[1:], Trial(1.0, 100, 6.39, 60.0, 6.4)))) == ""


def test_a_source_is_part_of_the_run(folder, monkeypatch, capsys):
    """Half the layers and the width, for a fifth of the time; its cost is the method's, and it is made again where its model is lost."""
    pytest.importorskip("transformers")
    asked = []
    monkeypatch.setattr(
        sweep_settings, "steps_that_fit", lambda recipe, each, seconds: asked.append((len(each), seconds)) or STEPS
    )
    line = LINE.replace("mslt", "bert2bert", 1).replace("--mslt.stages 2", "--seeds 2")
    code, out, _ = run(line + " --dry-run", capsys)
    assert (
        code == 0
        and "bert2bert: each run first trains its source, 1 layers of hidden size 8, for 20% of its time" in out
    )
    code, out, err = run(line, capsys)
    assert code == 0, err
    assert asked == [(1, 24.0), (1, pytest.approx(4.8)), (2, pytest.approx(19.2))]
    there = recorded(folder)["methods"]["bert2bert"]
    assert there["source"]["model"]["hidden"] == 8 and len(there["source_seconds_per_step"]) == 1
    assert "! bert2bert: the source of each run is counted: " in out and "different source" not in out
    methods = {m["name"]: m for m in json.loads((folder / "out" / "compare.json").read_text())["methods"]}
    ours, spent = methods["bert2bert"], {}
    assert ours["seeds"] == [0, 1] and len(ours["sources"]) == 2
    for name in ("bert2bert-seed0", "sources/bert2bert-seed0"):
        events = read_metrics(folder / "out" / name / "metrics.jsonl")
        spent[name] = events[-1]["tokens"]
        assert next(e for e in events if e["event"] == "stage")["depth"] == (1 if "sources" in name else 2)
    assert ours["spent"]["tokens"]["mean"] == sum(spent.values())

    # Only the logs are left, as where a machine was given back: a further seed does not need them, a run that is not finished does.
    seed0 = folder / "out" / "bert2bert-seed0"
    for part in ("checkpoints", "model"):
        shutil.rmtree(folder / "out" / "sources" / "bert2bert-seed0" / part)
        shutil.rmtree(seed0 / part, ignore_errors=True)
    (seed0 / "metrics.jsonl").unlink()
    before = (folder / "out" / "sources" / "bert2bert-seed0" / "metrics.jsonl").read_bytes()
    code, _, err = run(line, capsys)
    assert code == 0 and err.count("finished before") == 3, err
    again = folder / "out" / "sources" / "bert2bert-seed0"
    assert (again / "model" / "config.json").exists() and (again / "metrics.jsonl").read_bytes() != before


def test_a_teacher_is_part_of_the_run(folder, capsys):
    """Half the layers of the same width."""
    pytest.importorskip("transformers")
    line = LINE.replace("mslt", "late_to_early", 1).replace(
        "--mslt.stages 2", "--source-share 0.3 --late-to-early.early 1"
    )
    code, out, _ = run(line + " --dry-run", capsys)
    assert (
        code == 0
        and "late_to_early: each run first trains its teacher, 1 layers of hidden size 16, for 30% of its time" in out
    )
    code, out, err = run(line, capsys)
    assert code == 0 and f"! late_to_early: teacher {folder}/out/sources/late_to_early-seed0 is counted: " in out, err


def test_the_smaller_model():
    model = half_size(ModelConfig(layers=12, hidden=128, heads=2))
    assert (model.layers, model.hidden, model.heads, model.inner, model.head_dim) == (6, 64, 1, 256, 64)
    model = half_size(ModelConfig(layers=1, hidden=64, heads=1))
    assert (model.layers, model.hidden, model.heads) == (1, 64, 1)
    base = TrainConfig(model=ModelConfig(layers=4, hidden=16, heads=2), data=DataConfig(text=("text.txt",)))
    sweep = Sweep(base, ("bert2bert",), sweep_settings.Path("out"), 100.0, rates={"bert2bert": 5e-3}, source_share=0.3)
    config, source = sweep.fitted("bert2bert", Timing((0.1, 0.2), (0.05,)))
    assert source.steps == 600 and source.optim.lr == 5e-3 and source.recipe == "baseline" and source.optim.warmup == 30
    assert sum(s.steps * each for s, each in zip(config.stages, (0.1, 0.2), strict=True)) == pytest.approx(
        70.0, abs=0.3
    )


def test_a_piece_begins_no_run_that_would_not_end_in_it(folder, capsys):
    """Its runs are to take 24 s each, and the piece ends after 12: it times the methods; the next piece makes the runs."""
    code, _, err = run(LINE + " --stop-after 0.2", capsys)
    assert code == 1 and err.endswith("stackbert: stopped; the same command goes on\n") and "seed 0:" not in err
    assert len(recorded(folder)["methods"]) == 2 and not (folder / "out" / "baseline-seed0").exists()
    code, _, err = run(LINE + " --stop-after 9", capsys)
    assert code == 0 and "timing" not in err and err.count("held-out loss") == 2


BAD = {
    "--tune 1e-3 1e-3": "sweep: tune must be rates > 0, each once, got 0.001 0.001",
    "--tune 1e-3 0": "sweep: tune must be rates > 0, each once, got 0.001 0",
    "--tune 1e-3 --tune-minutes 2": "sweep: tune_minutes must be in (0, minutes 0.4], got 2",
    "--tune 1e-3 --lr 1e-3": "--lr: with --tune, wanted only rates of single recipes, as mslt=0.001, got 0.001",
    "--source-share 1": "sweep: source_share must be in (0, 1), got 1",
    "--source missing": "sweep: --source is for bert2bert, but the recipes are baseline, mslt",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_use_is_one_line(folder, capsys, options):
    code, _, err = run(f"{LINE} {options}", capsys)
    assert code == 2 and BAD[options] in err and err.count("\n") == 1 and os.listdir(folder) == ["text.txt"]


@pytest.mark.parametrize("options", ["--norm pre", "--embedding 8"])
def test_a_source_that_is_no_bert_is_refused(folder, capsys, options):
    code, _, err = run(LINE.replace("mslt", "bert2bert", 1).replace("--mslt.stages 2", options), capsys)
    assert code == 2 and "sweep: the source of bert2bert is a BERT: norm must be 'post' and embedding 0" in err


def test_a_given_source_is_for_all_seeds(folder, capsys):
    """It must be there and fit before anything begins; the text is read by its words."""
    code, _, err = run(LINE.replace("mslt", "bert2bert", 1).replace("--mslt.stages 2", "--source text.txt"), capsys)
    assert code == 2 and "source: text.txt must be a run or a transformers directory" in err
    sweep = Sweep(TrainConfig(source="given"), ("baseline", "bert2bert"), folder / "out", 60.0)
    assert sweep.makes("bert2bert") is None and sweep.makes("baseline") is None
    assert sweep.config("bert2bert", 100).source == "given" and sweep.config("baseline", 100).source == ""
    assert sweeps.Sweep is Sweep
