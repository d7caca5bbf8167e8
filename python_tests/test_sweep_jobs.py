"""Several runs of a sweep at a time: each in a process of its own; how they begin, end, stop and crash."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from stackbert_kernels.cli import main
from stackbert_kernels.config import DataConfig, ModelConfig, TrainConfig
from stackbert_kernels.sweep import check, side_by_side
from stackbert_kernels.sweep import settings as sweep_settings
from stackbert_kernels.sweep.work import FILL, TRAIN, Work
from stackbert_kernels.train import loop
from stackbert_kernels.train.run_directory import read_metrics

SMALL = (
    "--layers 2 --hidden 16 --heads 2 --seq-len 16 --max-position 16 --batch-tokens 64 --train-vocab-size 80 --heldout 0.1 "
    "--eval-tokens 128 --device cpu --mslt.stages 2 --norm pre --embedding 8"  # transformers has no such model: nothing is exported
)
LINE = f"sweep mslt text.txt --out out --minutes 0.05 --seeds 2 --jobs 2 {SMALL}"
STEPS = 60


@pytest.fixture
def two_cores(monkeypatch):
    """On a machine with one, both jobs share it."""
    here = side_by_side.cores()
    for module in (side_by_side, check):
        monkeypatch.setattr(module, "cores", lambda: (here * 2)[:2])


@pytest.fixture
def folder(tmp_path, monkeypatch, two_cores):
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    lines = (" ".join(words.choices("abc acb bac bca cab cba".split(), k=12)) + "." for _ in range(200))  # noqa: SIM905
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda *_: STEPS)
    return tmp_path


def when(condition, act):
    """`act()` once `condition()` holds, beside the main thread, which must stay free to receive a signal."""

    def wait():
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if condition():
                return act()
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_stopped_in_the_middle_and_on_to_the_end(folder, monkeypatch, capsys):
    """A signal stops both, each saves; the same command goes on without a second timing, and ends as runs one after another do."""
    runs = [folder / "out" / f"mslt-seed{seed}" for seed in (0, 1)]

    def trains():
        return any(e["event"] == "step" for e in read_metrics(runs[0] / "metrics.jsonl"))

    when(trains, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, err = main(LINE.split()), capsys.readouterr().err
    assert code == 1 and err.endswith("stackbert: stopped; the same command goes on\n"), err
    assert "mslt seed 0: stopped by SIGTERM after step" in err and "mslt seed 1: stopped b" in err
    assert "1 thread each: about" in err and "timing mslt, every stage" in err
    reached = read_metrics(runs[0] / "metrics.jsonl")[-1]
    assert reached["event"] == "checkpoint" and 0 < reached["step"] < STEPS
    recorded = json.loads((folder / "out" / "sweep.json").read_text())
    assert (recorded["jobs"], recorded["threads"]) == (2, 1)
    assert [len(entry["seconds_per_step"]) for entry in recorded["methods"].values()] == [3]

    code, (out, err) = main(LINE.split()), capsys.readouterr()
    assert code == 0 and "timing" not in err and err.count("held-out loss") == 2, err
    assert "seconds: training as measured (2 runs at a time, 1 thread each)" in out
    assert json.loads((folder / "out" / "compare.json").read_text())["load"] == {"jobs": 2, "threads": 1}
    assert sorted(p.name for p in (folder / "out" / ".logs").iterdir() if p.suffix == ".json") == []
    assert not (folder / "out" / ".timing").exists()

    # Two at a time have computed what one alone computes.
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    alone = main([*LINE.replace("--jobs 2", "--threads 1").replace("--out out", "--out alone").split()])
    ends = [
        [read_metrics(folder / out / run.name / "metrics.jsonl")[-1]["eval_loss"] for run in runs]
        for out in ("out", "alone")
    ]
    assert alone == 0 and ends[0] == ends[1]

    # Seconds under another load cannot be compared.
    capsys.readouterr()
    for line, wanted in (
        (
            LINE.replace("--jobs 2", "--threads 1"),
            "2 runs at a time, 1 thread each, wanted 1 run at a time, 1 thread each",
        ),
        (LINE.replace("--jobs 2", "--jobs 1"), "2 runs at a time, 1 thread each, wanted 1 run at a time"),
    ):
        code, err = main([*line.split(), "--seeds", "3"]), capsys.readouterr().err
        assert code == 2 and f"out was timed with {wanted}" in err and err.count("\n") == 1


def test_comparing_runs_made_under_different_loads_is_noted(folder, monkeypatch, capsys):
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda *_: 20)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    line = (
        LINE.replace("mslt", "baseline", 1).replace("--mslt.stages 2", "--threads 1").replace("--jobs 2", "--seeds 1")
    )
    assert main(line.split()) == 0 and main([*line.replace("--out out", "--out other").split(), "--lr", "2e-3"]) == 0
    recorded = json.loads((folder / "other" / "sweep.json").read_text())
    (folder / "other" / "sweep.json").write_text(json.dumps(recorded | {"jobs": 2}))
    capsys.readouterr()
    assert main(["compare", "out", "other", "--baseline", "out/baseline-seed0"]) == 0
    out = capsys.readouterr().out
    assert (
        "! different number of runs at a time, so that seconds mean different things: 1 (baseline lr=0.0001), 2 ("
        in out
    )
    assert "training as measured;" in out


BAD = {
    "--jobs 0": "sweep: jobs must be >= 1, got 0",
    "--jobs 3": "sweep: jobs must be <= 2, the cores that are here, got 3",
    "--jobs 2 --threads 2": "sweep: jobs x threads must be <= 2, the cores that are here, got 2 x 2",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_use_is_one_line(folder, capsys, options):
    code, err = main(LINE.replace("--jobs 2", options).split()), capsys.readouterr().err
    assert code == 2 and BAD[options] in err and err.count("\n") == 1 and os.listdir(folder) == ["text.txt"]


# The processes, by one in the place of a run that does as its name says.

STAND_IN = """
import json, os, signal, sys, time
given = json.load(open(sys.argv[1]))
name, log = given["work"]["name"], open("events", "a", buffering=1)
print(name, "begins", file=log)
signal.signal(signal.SIGTERM, lambda *_: (print(name, "stops", file=log), finish("stopped")))
def finish(status):
    with open(sys.argv[2], "w") as file:
        json.dump({"status": status, "message": name, "cores": given["cores"], "threads": os.environ.get("OMP_NUM_THREADS")}, file)
    print(name, "ends", file=log)
    os._exit(0)
if name == "killed":
    print("line one\\nline two", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if name == "broken":
    raise SystemExit("no such thing")
if name == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(30 if name in ("long", "stubborn", "filler 0", "filler 1") else float(name.partition(" ")[2] or 0))
finish("finished")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch, two_cores):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(side_by_side, "COMMAND", (sys.executable, str(tmp_path / "stand_in.py")))
    return tmp_path


def perform(folder, *names, jobs=2, fits=lambda work: True):
    """Whether all was done, results by name, and what the processes noted."""
    config = TrainConfig(ModelConfig(max_position=128), DataConfig(), threads=1)
    results = {}
    done = side_by_side.side_by_side(
        [Work(TRAIN, name, config, folder / name) for name in names],
        jobs,
        folder,
        begins=lambda work: None,
        ended=lambda work, result: results.update({work.name: result}),
        filler=Work(FILL, "filler", config, folder / "filler"),
        fits=fits,
        overview=lambda waiting, active: "",
    )
    return done, results, (folder / "events").read_text().splitlines()


def test_each_has_its_own_core_and_the_last_is_not_alone(stand_in):
    """Two slots, three pieces: as soon as nothing is left to begin, a slot that is free is kept busy, until the last piece has ended."""
    done, results, events = perform(stand_in, "first 0.1", "second 0.6", "third 0.1")
    assert done and [r["status"] for r in results.values()] == ["finished"] * 3
    assert list(results) == ["first 0.1", "third 0.1", "second 0.6"]
    own = side_by_side.cores()
    assert results["first 0.1"]["cores"] == own[:1] and results["second 0.6"]["cores"] == own[1:2]
    assert results["third 0.1"]["cores"] == own[:1] and results["third 0.1"]["threads"] == "1"
    assert events.index("filler 0 begins") > events.index("third 0.1 ends")
    assert "filler 0 ends" not in events and "filler 1 begins" not in events


def test_what_crashes_is_told_and_the_others_go_on(stand_in):
    done, results, _ = perform(stand_in, "killed", "broken", "good")
    assert done and results["good"]["status"] == "finished"
    for name, said in (
        ("killed", "(killed by SIGKILL): line one | line two"),
        ("broken", "(exit status 1): no such thing"),
    ):
        assert results[name]["status"] == "crashed" and said in results[name]["message"]


def test_a_second_signal_ends_those_that_do_not_stop(stand_in):
    def begun(name):
        return lambda: name in ((stand_in / "events").read_text() if (stand_in / "events").exists() else "")

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        when(begun("long ends"), lambda: os.kill(os.getpid(), signal.SIGINT))

    when(lambda: begun("long begins")() and begun("stubborn begins")() and not time.sleep(0.2), twice)
    done, results, events = perform(stand_in, "long", "stubborn", "never")
    assert not done and {name: r["status"] for name, r in results.items()} == {"long": "stopped", "stubborn": "stopped"}
    assert "never begins" not in events and "long stops" in events


def test_a_run_does_not_outlive_the_sweep():
    code = (
        "import time\nfrom stackbert_kernels.sweep.process import end_with_the_one_that_began\n"
        "end_with_the_one_that_began()\ntime.sleep(60)"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=root)
    process.stdin.close()
    assert process.wait(timeout=30) == -signal.SIGTERM
