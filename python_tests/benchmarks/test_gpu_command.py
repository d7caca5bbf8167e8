"""python -m benchmarks.gpu: all of it without a GPU, what a phase can do wrong, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from result_samples import MACHINE, op_row

from benchmarks import bench_dropin, bench_sweep, bench_train_step, machine_code
from benchmarks.__main__ import run_parser
from benchmarks.command_line import BadUse
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, outcomes, phases, sanitize, summary, tests
from benchmarks.gpu.phases import Phase, Setting
from stackbert_kernels.sweep.performing import ASIDE

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # it is slow


def python(code: str):
    return lambda setting, seconds: [sys.executable, "-c", code]


def collect(setting: Setting) -> dict:
    return phases.written(setting.scratch / "found.json") or {}


WRITES = "import os, sys; open(os.environ['FOUND'], 'w').write('{\"lines\": [\"seen\"]}')"


@pytest.fixture
def everything(tmp_path, capfd, monkeypatch):
    """everything(*phases, minutes=...) -> (exit code, gpu.json, stdout), for phases made of small scripts."""

    def call(*made: Phase, minutes: float = 1.0):
        options = SimpleNamespace(out=tmp_path, minutes=minutes, pretend=True, commit="abc")
        code = command.everything(options, made)
        return code, json.loads((tmp_path / "gpu.json").read_text()), capfd.readouterr().out

    return call


# The whole of it.


@pytest.mark.slow
def test_the_whole_flow_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    argv = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--out",
        str(out),
        "--pretend",
        "--minutes",
        "20",
        "--commit",
        "abc",
    ]
    ran = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    result = json.loads((out / "gpu.json").read_text())
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}\n{(out / 'log.txt').read_text()[-6000:]}"
    assert result["passed"] and result["pretend"] and not ran.stderr
    assert list(result["phases"]) == [phase.name for phase in command.PHASES]
    assert {phase["state"] for phase in result["phases"].values()} == {"passed"}

    found = result["phases"]
    assert found["build"]["info"]["file"].endswith(".so")
    assert found["tests"]["counts"]["passed"] >= 4 and not found["tests"]["failures"]
    assert found["sanitizer"]["verdicts"]["memcheck"]["ran"] > 20
    assert json.loads((out / "ops.json").read_text())["quick"] and "14 rows" not in found["steps"]["lines"]
    assert json.loads((out / "train_step.json").read_text())["kind"] == "train_step"
    dropin = json.loads((out / "dropin.json").read_text())
    assert dropin["kind"] == "dropin" and all("ours patched" in row["seconds"] for row in dropin["rows"])
    assert len(found["training"]["mslt"]["losses"]) == 40 and len(found["training"]["stages"]) == 5

    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) <= 8 and all(file.parent == out and file.stat().st_size < 16 << 20 for file in files)
    assert "PRETEND" in ran.stdout and "everything passed" in ran.stdout
    table = ran.stdout.partition("\n\n")[2].splitlines()
    assert 15 < len(table) < 60


@pytest.mark.slow
def test_pieces_of_a_sweep_without_a_gpu(tmp_path):
    """The first piece makes all, being so small; the second has another folder, finds that all is done, and what it came to."""
    results = []
    for piece, resume in (("one", []), ("two", ["--resume", str(tmp_path / "one")])):
        argv = [sys.executable, "-m", "benchmarks.gpu", "--phase", "sweep", "--pretend", "--minutes", "4", *resume]
        ran = subprocess.run(
            [*argv, "--out", str(tmp_path / piece)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
        )
        log = (tmp_path / piece / "log.txt").read_text()
        assert ran.returncode == 0 and not ran.stderr, f"{ran.stdout}\n{ran.stderr}\n{log[-6000:]}"
        results.append(json.loads((tmp_path / piece / "gpu.json").read_text())["phases"]["sweep"])
        assert ("finished before" in log) == (piece == "two") and ("[tuning 4/4]" in log) == (piece == "one")
        files = [file.name for file in (tmp_path / piece).iterdir()]
        assert {"sweep.tar.gz", "sweep.tar.gz.tokens", "compare.json", "gpu.json", "log.txt"} <= set(files) and len(
            files
        ) <= 8
    assert all(found["lines"][0] == "2 of 2 runs finished" and found["finished"] == 2 for found in results)
    assert any("Cost until held-out loss" in line for line in results[0]["lines"])
    one, two = (json.loads((tmp_path / piece / "compare.json").read_text())["target"] for piece in ("one", "two"))
    assert one == two


# A phase that goes wrong.


def test_a_phase_that_hangs_is_cut_off_with_its_children_and_the_next_one_runs(everything, tmp_path):
    """It hangs in a child, after it had written what it had found."""
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    code = f"import subprocess, sys; print('working'); {WRITES}; subprocess.run([sys.executable, '-c', {child!r}])"

    def hang(setting, seconds):
        os.environ["FOUND"] = str(setting.scratch / "found.json")
        return [sys.executable, "-c", code]

    good = Phase("good", 1, python("print('fine')"), lambda setting: {"lines": ["it ran"]})
    status, result, out = everything(Phase("hangs", 1, hang, collect), good, minutes=0.15)
    hung, after = result["phases"]["hangs"], result["phases"]["good"]
    assert status == 1 and not result["passed"]
    assert hung["state"] == "cut off" and hung["lines"] == ["seen"] and "were up" in hung["reason"]
    assert after["state"] == "passed" and "CUT OFF" in out and "failed: hangs" in out
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # init may take a moment to bury it
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)


def test_a_phase_that_crashes_is_told_by_its_last_line(everything):
    crash = Phase("crashes", 1, python("print('a'); raise RuntimeError('no such kernel')"), lambda s: {}, fine=(0,))
    killed = Phase("killed", 1, python("import os; os.kill(os.getpid(), 11)"), lambda s: {})
    good = Phase("good", 1, python(""), lambda s: {})
    status, result, out = everything(crash, killed, good)
    assert status == 1
    assert result["phases"]["crashes"]["reason"] == "exit status 1: RuntimeError: no such kernel"
    assert result["phases"]["killed"]["reason"].startswith("ended by SIGSEGV")
    assert result["phases"]["good"]["state"] == "passed"
    assert "failed: crashes, killed" in out


@pytest.mark.parametrize(
    ("code", "found", "state"),
    [
        ("", {"failures": ["test_x: wrong"]}, "failed"),
        ("raise SystemExit(1)", {"failures": []}, "failed"),
        ("raise SystemExit(1)", {"explained": True}, "passed"),
        ("raise SystemExit(2)", {"explained": True}, "failed"),
        ("", {"skipped": "no tool"}, "skipped"),
        ("raise SystemExit(1)", {"skipped": "no tool"}, "failed"),
    ],
)
def test_what_a_phase_says_decides(everything, code, found, state):
    status, result, _ = everything(Phase("it", 1, python(code), lambda setting: found))
    assert result["phases"]["it"]["state"] == state
    assert (status == 0) == (state in ("passed", "skipped"))


def test_results_that_cannot_be_read_do_not_end_the_run(everything):
    def broken(setting):
        return json.loads('{"half')

    status, result, _ = everything(Phase("it", 1, python("raise SystemExit(3)"), broken))
    assert status == 1 and "JSONDecodeError" in result["phases"]["it"]["unreadable"]


def test_a_long_log_is_cut_in_its_middle(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "LOG_BYTES", 2000)
    code = "print('first'); [print('x' * 99) for _ in range(1000)]; print('last')"
    everything(Phase("before", 1, python("print('kept')"), lambda s: {}), Phase("long", 1, python(code), lambda s: {}))
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 3000 and "kept" in log and "first" in log and "too long" in log and log.endswith("last\n")


def test_time_that_is_not_used_flows_on():
    made = [Phase("a", 1.5, None, None, stretch=2.5), Phase("b", 2, None, None), Phase("c", 1, None, None)]
    assert phases.limit(made[0], made[1:], 450) == pytest.approx(2.5 * 150)
    assert phases.limit(made[1], made[2:], 440) == pytest.approx(440 * 2 / 3)
    assert phases.limit(made[2], [], 400) == 400
    assert phases.limit(Phase("d", 9, None, None, stretch=3), made, 100) == 100


# A run that is ended from outside.

SCRIPT = """
import signal, sys
from types import SimpleNamespace
from pathlib import Path
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.phases import Phase
quick = Phase("quick", 1, lambda s, t: [sys.executable, "-c", ""], lambda s: {"lines": ["done"]})
slow = Phase("slow", 1, lambda s, t: ["sleep", "20"], lambda s: {"lines": ["so far"]})
signal.signal(signal.SIGTERM, command._interrupt)
options = SimpleNamespace(out=Path(sys.argv[1]), minutes=2, pretend=True, commit=None)
sys.exit(command.everything(options, (quick, slow, quick)))
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_has_told_what_it_had(tmp_path, by):
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while "slow: at most" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(by)
    out, _ = process.communicate(timeout=30)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert not result["passed"] and result["phases"]["quick"]["state"] == "passed"
    assert result["phases"]["slow"]["state"] == ("cut off" if by == signal.SIGTERM else "running")
    if by == signal.SIGTERM:
        assert process.returncode == 1 and "interrupted" in out and "failed: slow" in out
    else:
        assert "failed: slow" in summary.text(result)


# What is refused, in one line, before any work.


def refused(*arguments) -> str:
    options = command.parser("gpu").parse_args(list(map(str, arguments)))
    with pytest.raises(BadUse) as error:
        command.check(options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "wants a GPU, torch" in refused("--out", tmp_path / "out") and not (tmp_path / "out").exists()


def test_a_gpu_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    assert "wants nvcc to build the extension for this GPU: no nvcc at CUDACXX=/no/such/nvcc" in refused(
        "--out", tmp_path
    )
    monkeypatch.setenv("STACKBERT_SKIP_CUDA_BUILD", "yes")
    assert "must be 0 or 1" in refused("--out", tmp_path)


def test_a_gpu_with_nvcc_is_taken(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\ncase "$1" in --version) echo "release 13.0, V13.0.88";; *) echo sm_90 sm_100;; esac\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    command.check(command.parser("gpu").parse_args(["--out", str(tmp_path / "out")]))
    assert (tmp_path / "out").is_dir()


def test_the_benchmarks_take_the_options_that_a_gpu_run_gives_them(tmp_path):
    setting = Setting(ROOT, tmp_path, tmp_path, "cuda", False, "abc")
    by_name = {phase.name: phase.command(setting, 100.0) for phase in command.PHASES}
    given = run_parser("benchmarks").parse_args(by_name["ops"][3:])
    assert (given.device, given.commit, given.minutes, given.ops, given.quick) == ("cuda", "abc", 1.5, [], False)
    assert by_name["steps"][3] == "train_step"
    given = bench_train_step.parser("train_step").parse_args(by_name["steps"][4:])
    assert (given.device, given.minutes, given.out) == ("cuda", 1.5, tmp_path / "steps")
    assert by_name["dropin"][3] == "dropin"
    given = bench_dropin.parser("dropin").parse_args(by_name["dropin"][4:])
    assert (given.device, given.commit, given.seconds, given.size) == ("cuda", "abc", 5.556, None)
    sweep = command.SWEEP.command(replace(setting, sweep="base", text=("corpus",)), 400.0)
    given = bench_sweep.parser("sweep").parse_args(sweep[4:])
    assert sweep[3] == "sweep" and (given.preset, given.text, given.stop_after) == ("base", ["corpus"], 6.417)
    assert (given.out, given.state, given.jobs) == (tmp_path / "sweep", tmp_path / "sweep.tar.gz", None)
    runs = tests.commands(tmp_path, False)
    assert runs["others"][-3:] == ["gpu", f"--ignore={tests.FILLS_MEMORY}", "python_tests"]
    assert runs["memory"][-1] == tests.FILLS_MEMORY and (ROOT / tests.FILLS_MEMORY).is_file()


@pytest.mark.parametrize(("statuses", "status"), [([0, 0], 0), ([0, 1], 1), ([1, 5], 5), ([-11, 0], 139), ([1, 2], 2)])
def test_the_worse_of_two_test_runs_counts(statuses, status):
    assert tests.worst(statuses) == status


def test_a_piece_goes_on_from_one_that_is_there(tmp_path):
    argv = ["--out", tmp_path, "--pretend", "--resume", tmp_path / "none"]
    assert f"--resume must be the folder of an earlier piece, got {tmp_path}/none without sweep.tar.gz" in refused(
        *argv
    )


def test_every_gpu_preset_has_room_in_a_piece():
    """Of nine minutes: the build takes at most its own part, and in the rest at least one run ends."""
    build = next(phase for phase in command.PHASES if phase.name == "build")
    left = 9 * 60 - command.RESERVE_SECONDS
    sweep = left - phases.limit(build, [command.SWEEP], left) - command.SWEEP_ASIDE_SECONDS
    for name in ("small", "base"):
        assert 60 * bench_sweep.PRESETS[name].minutes * ASIDE < sweep


def test_too_few_minutes(tmp_path):
    assert refused("--out", tmp_path, "--minutes", 2) == "--minutes must be at least 3, got 2"
    assert "at least 3, got nan" in refused("--out", tmp_path, "--minutes", "nan")
    assert "at least 0.5" in refused("--out", tmp_path, "--minutes", 0, "--pretend")


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written: File exists" in refused("--out", tmp_path / "file", "--pretend")
    assert "cannot be written: Not a directory" in refused("--out", tmp_path / "file" / "below", "--pretend")


def test_no_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    assert "no setup.py, python_tests in" in refused("--out", tmp_path, "--pretend")


def test_bad_use_is_one_line_and_exit_code_2(tmp_path):
    argv = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "soon", "--out", str(tmp_path)]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr == "benchmarks.gpu: argument --minutes: invalid float value: 'soon'\n"


# The build.

USAGE = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN9stackbert4cuda3fooEPi:
  REG:24 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function bar:
  REG:255 STACK:96 SHARED:0 LOCAL:8 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_kernels_with_the_most_registers_come_first():
    rows = machine_code.resource_usage(USAGE)
    assert rows == [
        {"kernel": "bar", "arch": "sm_90a", "registers": 255, "shared": 0, "stack": 104},
        {"kernel": "_ZN9stackbert4cuda3fooEPi", "arch": "sm_90a", "registers": 24, "shared": 1024, "stack": 0},
    ]
    info = {"compiler": "GNU 12", "cuda": "13.0", "cuda_archs": ["90a-real"]}
    first, *stacks = build.lines(info, rows)
    assert "2 kernels, most registers 255 (bar)" in first and stacks == ["stack 104 B, 255 registers: bar"]
    assert machine_code.readable([row["kernel"] for row in rows]) == ["bar", "foo"]


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "90a-real"), ((8, 0), "80-real"), ((8, 9), "89-real"), ((10, 0), "100a-real")]
)
def test_the_architecture_of_the_gpu(capability, arch):
    assert build.architecture(capability, build.setup_module(ROOT).DEFAULT_ARCHS) == arch


# The tests' outcomes.

SAMPLE = """
import pytest
def test_good(): pass
def test_bad():
    assert 1 + 1 == 3, "arithmetic\\nis broken"
@pytest.mark.skip(reason="no such device")
def test_skipped(): pass
@pytest.fixture
def broken():
    yield
    raise OSError("left open")
def test_tear_down(broken): pass
"""


def test_outcomes_of_a_run(tmp_path):
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "test_lacking.py").write_text("import no_such_package")
    (tmp_path / "test_broken.py").write_text("x = = 1")
    (tmp_path / "test_ours.py").write_text("import benchmarks.no_such_part")
    file = tmp_path / "outcomes.jsonl"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.outcomes", "--outcomes", str(file)]
    argv += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    status = subprocess.run(argv, cwd=ROOT, capture_output=True).returncode
    with file.open("a") as half:
        crash = {"test": "test_sample.py::test_bad", "outcome": "failed", "seconds": 0, "message": "worker crashed"}
        half.write(json.dumps(crash) + '\n{"test": "test_x", "outc')
    found = outcomes.read(file)
    assert status == 1 and found["explained"]
    assert found["counts"] == {"passed": 1, "failed": 4, "skipped": 1, "lacking": 1}
    assert "test_sample.py::test_bad: AssertionError: arithmetic is broken assert (1 + 1) == 3" in found["failures"]
    assert any("test_tear_down: OSError: left open" in line for line in found["failures"])
    assert any("SyntaxError" in line for line in found["failures"])
    assert found["skips"] == {"no such device": 1}
    assert found["lacking"] == ["ModuleNotFoundError: No module named 'no_such_package'"]
    assert found["lines"][:2] == ["1 passed, 4 failed, 1 skipped", "1 skipped: no such device"]


# The sanitizer's verdict.

RAN = "of 4\ndone dropout native float32\nrefused dropout native float16: no\ndone dropout triton float32\n"


@pytest.mark.parametrize(
    ("status", "output", "state", "reason"),
    [
        (0, f"========= COMPUTE-SANITIZER\n{RAN}========= ERROR SUMMARY: 0 errors", "passed", None),
        (
            86,
            f"{RAN}========= Invalid __global__ read of size 4\n=========     at foo+0x10",
            "failed",
            "Invalid __global__",
        ),
        (
            1,
            "========= COMPUTE-SANITIZER\n========= Error: Device not supported. See",
            "skipped",
            "Device not supported",
        ),
        (86, f"{RAN}========= Error: process didn't terminate; before first instrumented API call", "failed", "errors"),
        (
            86,
            "========= Device not supported\n========= Program hit CUDA error 999\nRuntimeError",
            "skipped",
            "not supported",
        ),
        (1, "Traceback\nImportError: no torch", "failed", "exit status 1: ImportError: no torch"),
        (0, "of 4\n", "failed", "exit status 0"),
    ],
)
def test_the_sanitizer_is_judged_by_its_exit_status(status, output, state, reason):
    found = sanitize.verdict(status, output)
    assert found["state"] == state and (reason is None or reason in found["reason"])
    summed = sanitize.summarise({"memcheck": found, "racecheck": found})
    assert bool(summed["failures"]) == (state == "failed") and ("skipped" in summed) == (state == "skipped")
    if state == "passed":
        assert summed["lines"][0] == "memcheck passed: 2 of 3 op-implementation-dtype cases"


def test_the_sanitizer_runs_every_op_and_implementation():
    from stackbert_kernels import ops

    planned = sanitize.plan("cpu")
    assert {(op, impl) for op, impl, _ in planned} == {(op, i) for op, t in ops.available().items() for i in t["cpu"]}
    assert planned[-1][1] == "reference" and planned[0][1] != "reference"
    assert sanitize.command(["tool"], "racecheck", ["x"])[:5] == [
        "tool",
        "--tool",
        "racecheck",
        "--error-exitcode",
        "86",
    ]


# The table.


def phase(state="passed", **more) -> dict:
    return {"state": state, "seconds": 1.0, "limit": 9.0, **more}


def run_of(**found) -> dict:
    return {"machine": MACHINE, "pretend": False, "planned": list(found), "phases": found}


def test_the_table_stays_short_and_names_what_failed():
    many = [f"line {i}" for i in range(200)]
    result = run_of(
        build=phase(lines=["a", "b"]),
        tests=phase("failed", lines=["190 passed, 10 failed"], failures=[f"test {i}: off" for i in range(10)]),
        ops=phase(lines=many),
        steps=phase(lines=many[:30]),
        training=phase("cut off", reason="its 70 s were up"),
    )
    text = summary.text(result)
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= summary.WIDTH
    for wanted in (
        "FAILED test 0: off",
        "6 more failures in gpu.json",
        "lines more in gpu.json",
        "CUT OFF",
        "    a\n    b\n",
    ):
        assert wanted in text
    assert text.endswith("failed: tests, training")


def test_the_last_line_tells_what_never_ran():
    result = run_of(build=phase()) | {"planned": ["build", "tests"]}
    assert summary.verdict(result) == "not run: tests"
    assert summary.verdict(run_of(build=phase(), sanitizer=phase("skipped"))) == "everything passed; skipped: sanitizer"


def test_the_rows_of_the_benchmarks():
    rows = [
        op_row(dtype="fp32"),
        op_row(
            times={"native": 1e-4, "torch": 3e-4, "torch.compile": 1.5e-4, "triton": 1.1e-4}, wrong={"Liger": "far off"}
        ),
        op_row(op="bias_gelu", times={"torch": 3e-4}, wrong={"native": "output is off by 3"}),
    ]
    problems = ["attention x: not run, the time was up", "dropout y: RuntimeError: no"]
    lines, failures = summary.op_lines({"rows": rows, "problems": problems})
    assert lines[0] == "2 rows, 1 cases left out: the time was up"
    assert "bf16" in lines[2] and "torch.compile" in lines[2] and "fp32" in lines[3]
    assert failures == ["bias_gelu 65536 x 768 bf16 native: output is off by 3", "dropout y: RuntimeError: no"]
