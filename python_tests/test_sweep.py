"""A sweep: the same text, batches, evaluation and budget for every method; it goes on where it stopped and ends with the comparison."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

import stackbert_kernels
from stackbert_kernels import sweep as sweeps
from stackbert_kernels.cli import main
from stackbert_kernels.cli.arguments import parse
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.recipes import RECIPES, AlbertOptions, MsltOptions
from stackbert_kernels.sweep import Sweep, making
from stackbert_kernels.sweep import settings as sweep_settings
from stackbert_kernels.sweep import work as working
from stackbert_kernels.sweep.record import Record
from stackbert_kernels.train import loop
from stackbert_kernels.train.budget import timing_of
from stackbert_kernels.train.run_directory import read_metrics

SMALL = (
    "--layers 2 --hidden 16 --heads 2 --seq-len 16 --max-position 16 --batch-tokens 64 --train-vocab-size 80 --heldout 0.1 "
    "--eval-tokens 128 --threads 1 --device cpu --mslt.stages 2 --lr 1e-3 mslt=2e-3"
)
LINE = f"sweep baseline,mslt text.txt --out out --minutes 0.05 --seeds 2 {SMALL}"
STEPS = 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with text.txt to work in; every run takes 20 steps whatever the clock says."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    lines = (" ".join(words.choices("abc acb bac bca cab cba".split(), k=12)) + "." for _ in range(200))  # noqa: SIM905
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda *_: STEPS)
    monkeypatch.setattr(working, "TIMED_STEPS", 2)
    monkeypatch.setattr(working, "TIMING_SHARE", 0.0)
    monkeypatch.setattr(sweep_settings, "CHECKPOINTS", 2)
    monkeypatch.setattr(sweep_settings, "EVALUATIONS", 4)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)  # takes longer than these runs
    monkeypatch.setattr(loop, "exportable", lambda *_: False)
    return tmp_path


def run(line, capsys):
    code = main(line.split())
    return code, *capsys.readouterr()


def trained(monkeypatch) -> list[str]:
    """The runs that train from now on."""
    seen, train = [], loop.train

    def noted(config, out, **options):
        seen.append(out.name)
        return train(config, out, **options)

    monkeypatch.setattr(loop, "train", noted)
    return seen


def test_a_sweep_from_beginning_to_end_and_on(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    seen = trained(monkeypatch)
    code, out, err = run(LINE, capsys)
    assert code == 0, err
    assert seen == ["baseline", "mslt", "baseline-seed0", "mslt-seed0", "baseline-seed1", "mslt-seed1"]
    there = {
        "data",
        "sweep.json",
        "compare.json",
        "compare.png",
        "baseline-seed0",
        "baseline-seed1",
        "mslt-seed0",
        "mslt-seed1",
    }
    assert set(os.listdir("out")) == there
    assert "[4/4] mslt seed 1: held-out loss " in err and "4 runs, 0 of them finished: 12.0 s of training" in err
    assert "Cost until held-out loss" in out and "different lr: 0.001 (baseline), 0.002 (mslt)" in out
    stored = json.loads((folder / "out" / "compare.json").read_text())
    assert {m["name"]: m["seeds"] for m in stored["methods"]} == {"baseline": [0, 1], "mslt": [0, 1]}
    recorded = json.loads((folder / "out" / "sweep.json").read_text())["methods"]
    assert [len(entry["seconds_per_step"]) for entry in recorded.values()] == [1, 3]

    # A method is no reason for other batches: same seed, same tokens at every step, same evaluation.
    def events(name, kind):
        return [e for e in read_metrics(folder / "out" / name / "metrics.jsonl") if e["event"] == kind]

    for seed in (0, 1):
        ours, theirs = (
            [(e["step"], e["tokens"]) for e in events(f"{m}-seed{seed}", "step")] for m in ("baseline", "mslt")
        )
        assert len(ours) == STEPS and ours == theirs
    assert events("baseline-seed0", "step")[0]["tokens"] != 0
    rates = {m: max(e["lr"] for e in events(f"{m}-seed0", "step")) for m in ("baseline", "mslt")}
    assert rates["baseline"] == 1e-3 and rates["mslt"] <= 2e-3 and rates["mslt"] > 1e-3

    # The same command has nothing left to do; more seeds are added to what is there.
    code, again, err = run(LINE + " --json", capsys)
    assert code == 0 and err.count("finished before, held-out loss") == 4 and len(seen) == 6
    assert json.loads(again)["comparison"] == stored
    code, _, err = run(LINE.replace("--seeds 2", "--seeds 3").replace("baseline,mslt", "mslt,baseline"), capsys)
    assert code == 0 and seen[6:] == ["mslt-seed2", "baseline-seed2"]
    code, out, _ = run(LINE + " --dry-run", capsys)
    assert code == 0 and "4 runs, 4 of them finished: 0.0 s of training" in out and f"  {STEPS}\n" in out

    # Other settings are refused, each method by itself.
    for old, new, said in (
        ("--minutes 0.05", "--minutes 0.06", "out holds baseline with other settings: minutes: 0.05 -> 0.06"),
        ("mslt=2e-3", "mslt=3e-3", "out holds mslt with other settings: lr: 0.002 -> 0.003"),
        ("--hidden 16", "--hidden 32", "out holds baseline with other settings: hidden: 16 -> 32"),
    ):
        code, _, err = run(LINE.replace(old, new), capsys)
        assert code == 2 and said in err and err.count("\n") == 1
    (folder / "text.txt").write_text((folder / "text.txt").read_text() + "\n\nmore of it.")
    code, _, err = run(LINE, capsys)
    assert code == 2 and "was prepared with other inputs: text" in err
    assert len(seen) == 8

    # --fresh begins anew, and leaves alone what a sweep does not write.
    (folder / "out" / "notes.txt").write_text("mine")
    (folder / "out" / "mslt-seedling").mkdir()
    code, _, err = run(LINE.replace("baseline,mslt", "baseline").replace(" mslt=2e-3", "").replace("--mslt.stages 2", "--seeds 1") + " --fresh", capsys)  # fmt: skip
    assert code == 0, err
    assert set(os.listdir("out")) == {
        "data",
        "sweep.json",
        "compare.json",
        "compare.png",
        "baseline-seed0",
        "notes.txt",
        "mslt-seedling",
    }


def test_an_interrupted_sweep_goes_on(folder, monkeypatch, capsys):
    step, calls = loop.take_step, []

    def interrupts(*arguments):
        calls.append(0)
        if len(calls) == 2 + 7:  # the timing has two
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", interrupts)
    line = LINE.replace("baseline,mslt", "baseline").replace(" mslt=2e-3", "").replace("--mslt.stages 2", "")
    code, out, err = run(line, capsys)
    assert code == 1 and err.endswith("stackbert: stopped; the same command goes on\n")
    assert "stopped by SIGTERM after step 7 of 20" in err and out == ""  # one run, unfinished: nothing to compare
    assert sorted(os.listdir("out")) == ["baseline-seed0", "data", "sweep.json"]
    seen = trained(monkeypatch)
    code, out, _ = run(line, capsys)
    assert code == 0 and seen == ["baseline-seed0", "baseline-seed1"]
    assert len(calls) == 2 + 20 + 20  # no step twice, and no second timing
    assert "1  baseline     2" in out


def test_what_is_finished_is_compared_where_the_next_run_has_no_evaluation_yet(folder, monkeypatch, capsys):
    step, calls = loop.take_step, []

    def interrupts(*arguments):
        calls.append(0)
        if len(calls) == 2 + 20 + 1:  # the first step of the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", interrupts)
    line = LINE.replace("baseline,mslt", "baseline").replace(" mslt=2e-3", "").replace("--mslt.stages 2", "")
    code, out, _ = run(line, capsys)
    assert code == 1 and "1  baseline     1" in out
    assert "baseline-seed1 has no evaluation with a finite loss yet: left out" in out


def test_a_signal_during_the_timing(folder, monkeypatch, capsys):
    step = loop.take_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", lambda *a: os.kill(os.getpid(), signal.SIGINT) or step(*a))
        code, _, err = run(LINE, capsys)
    assert code == 1 and err.endswith("stopped; the same command goes on\n")
    assert sorted(os.listdir("out")) == ["data", "sweep.json"]
    recorded = json.loads((folder / "out" / "sweep.json").read_text())
    assert recorded == {"jobs": 1, "threads": 1, "tokens": recorded["tokens"], "methods": {}}


def test_a_method_that_diverges_is_a_finding(folder, monkeypatch, capsys):
    train = loop.train

    def diverges(config, out, **options):
        if out.name == "mslt-seed0":
            shutil.copytree(out.with_name("baseline-seed0"), out)
            lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
            (out / "metrics.jsonl").write_text("".join(line for line in lines if '"end"' not in line))
            text = (out / "config.json").read_text().replace('"recipe": "baseline"', '"recipe": "mslt"')
            (out / "config.json").write_text(text)
            return {"status": "failed", "message": "stopped at step 9: not finite"}
        return train(config, out, **options)

    monkeypatch.setattr(loop, "train", diverges)
    code, out, err = run(LINE.replace("--seeds 2", "--seeds 1"), capsys)
    assert code == 1 and err.endswith("stackbert: 1 of the runs failed: out/mslt-seed0\n")
    assert "! mslt, seed 0 is not ranked: stopped in mid-decay" in out and "1  baseline" in out


def test_what_breaks_does_not_keep_the_others(folder, monkeypatch, capsys):
    train = loop.train

    def breaks(config, out, **options):
        if out.name == "baseline-seed1":
            raise RuntimeError("out of memory:\n12 GiB")
        return train(config, out, **options)

    monkeypatch.setattr(loop, "train", breaks)
    code, _, err = run(LINE, capsys)
    assert code == 1 and "[3/4] baseline seed 1: RuntimeError: out of memory: 12 GiB\n" in err and "Traceback" in err
    assert (
        err.endswith("stackbert: 1 of the runs failed: out/baseline-seed1\n") and "[4/4] mslt seed 1: held-out" in err
    )


def test_a_budget_without_room(folder, monkeypatch, capsys):
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda *_: 7)
    code, _, err = run(LINE, capsys)
    assert code == 2 and "sweep: baseline in 0.05 minutes: 3 s have room for 7 steps, wanted at least 20" in err


BAD = {
    "sweep": "Missing from stackbert sweep: ",
    "sweep baseline": "--minutes",
    "sweep baseline,fast text.txt --out out --minutes 1": "sweep: recipes must be of baseline, mslt",
    "sweep , text.txt --out out --minutes 1": "sweep: wanted at least one recipe of baseline, mslt",
    "sweep mslt,mslt text.txt --out out --minutes 1": "sweep: each recipe once, got mslt, mslt",
    "sweep mslt text.txt --out out --minutes 0": "sweep: minutes must be > 0, got 0",
    "sweep mslt text.txt --out out --minutes 1 --seeds 0": "sweep: seeds must be >= 1, got 0",
    "sweep mslt text.txt --out out --minutes 1 --warmup-share 1": "sweep: warmup_share must be in (0, 1), got 1",
    "sweep mslt text.txt --out out --minutes 1 --lr fast": "--lr: wanted a number or RECIPE=number, got 'fast'",
    "sweep mslt text.txt --out out --minutes 1 --lr mslt=-1": "lr must be > 0",
    "sweep mslt text.txt --out out --minutes 1 --lr baseline=1": "sweep: --lr of baseline given, but the recipes are mslt",
    "sweep baseline text.txt --out out --minutes 1 --mslt.joint .3": "sweep: options of mslt given, but the recipes are baseline",
    "sweep mslt text.txt --out out --minutes 1 --layers 10": "mslt: layers must be divisible by stages, got layers 10, stages 4",
    "sweep mslt text.txt --out out --minutes 1 --steps 4": "Unrecognized",
    "sweep mslt nothing.txt --out out --minutes 1": "text: no such file, directory or glob: ",
    "sweep mslt --out out --minutes 1": "text must name at least one file, glob or directory, got none",
    "sweep mslt text.txt --out text.txt --minutes 1": "out must be a directory, got a file: text.txt",
    "sweep mslt text.txt --out . --minutes 1": "out must be new, empty or the directory of a sweep, got . with broken and no sweep.json",
    "sweep mslt text.txt --out broken --minutes 1": "cannot be read",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_use_is_one_line(folder, capsys, line):
    (folder / "broken").mkdir()
    (folder / "broken" / "sweep.json").write_text("{")
    before = sorted(os.listdir(folder))
    code, out, err = run(line, capsys)
    assert code == 2 and out == "" and err.startswith("stackbert: ") and err.count("\n") == 1
    assert BAD[line] in err
    assert sorted(os.listdir(folder)) == before


def test_dry_run_shows_the_time_loads_no_torch_and_writes_nothing(folder):
    script = (
        "import sys\nfrom stackbert_kernels.cli import main\n"
        f"code = main({(LINE + ' --dry-run').split()!r})\nprint(code, 'torch' in sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(stackbert_kernels.__file__))
    environment = os.environ | {"PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 False", done.stderr
    assert lines[1].split()[:4] == ["baseline", "0.001", "2", "0.05"] and lines[2].split()[1] == "0.002"
    assert lines[3] == "4 runs, 0 of them finished: 12.0 s of training, about 13.2 s with evaluation and checkpoints"
    assert sorted(os.listdir(folder)) == ["text.txt"]


def test_dry_run_as_json(folder, capsys):
    code, out, _ = run(LINE + " --dry-run --json", capsys)
    result = json.loads(out)
    assert code == 0 and (result["runs"], result["finished"], result["seconds_left"]) == (4, 0, pytest.approx(12.0))


def test_options_reach_the_runs():
    command = parse([*LINE.split(), "--mslt.joint", "0.5", "--warmup-share", "0.1", "--seed", "5"])
    base = command.base()
    assert type(base) is TrainConfig and type(base.optim) is OptimConfig and base.seed == 5 and base.model.hidden == 16
    assert command.rates(["baseline", "mslt"]) == {"baseline": 1e-3, "mslt": 2e-3}
    assert command.mslt == MsltOptions(stages=2, joint=0.5)
    with pytest.raises(ConfigError, match="got 'mslt=x'"):
        replace(command, lr=("mslt=x",)).rates(["mslt"])


def test_a_method_with_an_evaluation_of_its_own_is_refused(folder, monkeypatch):
    """Its losses would mean something else, which is said before hours of training and not after."""

    def easier(base, options):
        return replace(base, data=replace(base.data, mask_rate=0.05), stages=(), recipe="easier")

    monkeypatch.setitem(RECIPES, "easier", (easier, RECIPES["baseline"][1]))
    sweep = replace(sweep_of(folder), methods=("baseline", "easier"))
    with pytest.raises(
        ConfigError, match=r"easier would be evaluated in another way than baseline: mask_rate 0.05 and 0.15"
    ):
        sweeps.checked(sweep)


def test_sentence_order_is_evaluated_on_other_text(folder):
    """Held-out text of a pair objective is pairs: ALBERT is compared without sentence order, or with runs that have it too."""
    sweep = replace(sweep_of(folder), methods=("baseline", "albert"), directory=folder / "sweep")
    with pytest.raises(
        ConfigError, match=r"albert would be evaluated in another way than baseline: objective mlm\+sop and mlm"
    ):
        sweeps.checked(sweep)
    sweeps.checked(replace(sweep, options={"albert": AlbertOptions(sop=False)}))
    sweeps.checked(replace(sweep, base=replace(sweep.base, model=replace(sweep.base.model, objective="mlm+sop"))))


METHODS = ("baseline", "mslt", "stacking", "incremental")


def sweep_of(tmp_path, **changes) -> Sweep:
    base = TrainConfig(
        model=ModelConfig(layers=12, hidden=16, heads=2, max_position=16),
        data=DataConfig(text=("text.txt",), seq_len=16, batch_tokens=64),
        seed=3,
    )
    return Sweep(base, METHODS, tmp_path, 10.0, **changes)


def test_every_method_has_the_same_shape_of_run(tmp_path):
    """Whatever a recipe does with its stages: warm-up, evaluations and batches are laid over its steps in the same way."""
    sweep = sweep_of(tmp_path, warmup=0.1, rates={"mslt": 7e-3})
    for method in METHODS:
        config = sweep.config(method, 400)
        assert config.steps == 400 and config.optim.warmup == 40 and config.eval_every == 20 and config.recipe == method
        assert replace(config.data, max_ngram=1) == sweep.base.data and config.seed == 3
        assert config.optim.lr == (7e-3 if method == "mslt" else OptimConfig.lr)
        timed = timing_of(lambda steps, method=method: sweep.config(method, steps), 4)
        assert [s.steps for s in timed.stages] == [4] * len(
            config.stages
        ) and timed.optim.lr < 1e-5  # nothing diverges in four steps
    assert [(seed, path.name) for _, seed, path in sweep.runs()[:: len(METHODS)]] == [
        (s, f"baseline-seed{s}") for s in (3, 4, 5)
    ]


@pytest.mark.parametrize(("seconds", "timed"), [(10.0, [30]), (120.0, [30, 100]), (3600.0, [30, 200])])
def test_short_steps_are_timed_again(tmp_path, monkeypatch, seconds, timed):
    """Five stages of 12 ms: 30 steps of each are a moment, of which a busy machine makes anything."""
    asked = []

    def train(config, out, *, progress):
        asked.append(config.stages[0].steps)
        return {"status": "finished", "stage_seconds": [0.012] * len(config.stages)}

    monkeypatch.setattr(loop, "train", train)
    sweep = replace(sweep_of(tmp_path), seconds=seconds, methods=("mslt",))
    entry = making.timed(sweep, Record(), ["mslt"], lambda _: None)[0].methods["mslt"]
    assert asked == timed and entry.config.steps == pytest.approx(seconds / 0.012, rel=0.01)
