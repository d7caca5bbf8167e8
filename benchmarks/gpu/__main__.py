"""Everything that a machine with a GPU proves about this package: the build, the GPU tests, compute-sanitizer, the benchmarks, a training run.

Each part has its own time and is cut off at its end; results are written as soon as they exist. What this Python lacks is named and left out.
`--phase build sweep` compares the recipes instead (python -m benchmarks sweep), in pieces of so many minutes: each goes on from the
folder of the one before, given as --resume, on this machine or another of its kind, and begins no run that it could not end.
Exit status: 0 nothing failed, 1 something did, 2 bad use.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from .. import results_file
from ..command_line import DONE, FAILED, BadUse, Parser, answered
from . import outcomes, summary
from .build import setup_module
from .phases import CUT_OFF, RUNNING, Phase, Setting, limit, run, written
from .training import corpus

ROOT = Path(__file__).resolve().parents[2]
NEEDS = ("setup.py", "python_tests", "csrc")  # of a source tree; an installed package has none of them
SWEEP_ASIDE_SECONDS = 15.0  # after the last run of a piece: the comparison, and what is kept for the next
RESERVE_SECONDS = 15.0  # for the summary, and for a phase that dies slowly
LEAST_MINUTES = {"real": 3.0, "pretend": 0.5}
PRETEND_STEPS = [
    "--layers=4", "--hidden=32", "--heads=2", "--vocab=300", "--seq-len=16", "--tokens=64", "--repeats=2",
]  # fmt: skip


def parser(prog: str) -> Parser:
    made = Parser(prog=f"python -m {prog}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the results go")
    made.add_argument("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    made.add_argument("--commit", metavar="SHA", help="of these sources, where they are a copy without their history")
    names = [phase.name for phase in (*PHASES, SWEEP)]
    made.add_argument("--phase", nargs="+", choices=names, help=f"only these; default: all but {SWEEP.name}")
    made.add_argument("--sweep", choices=("small", "base"), default="small", help="size of the models (default small)")
    made.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="that the sweep reads; default: the documentation of this Python",
    )
    made.add_argument("--resume", type=Path, metavar="DIR", help="results of the sweep's piece before this one")
    made.add_argument(
        "--pretend", action="store_true", help="run through everything on a machine without a GPU, with small stand-ins"
    )
    return made


# The phases.


def _own(name: str, *arguments: str):
    return [sys.executable, "-m", f"{__package__}.{name}", *arguments]


def _result(name: str):
    return lambda setting: written(setting.scratch / f"{name}.json") or {}


def build_command(setting: Setting, seconds: float) -> list[str]:
    pretend = ["--pretend"] if setting.pretend else []
    return _own("build", "--result", str(setting.scratch / "build.json"), *pretend)


def tests_command(setting: Setting, seconds: float) -> list[str]:
    pretend = ["--pretend"] if setting.pretend else []
    return _own("tests", "--outcomes", str(setting.scratch / "tests.jsonl"), *pretend)


def tests_found(setting: Setting) -> dict:
    file = setting.scratch / "tests.jsonl"
    return outcomes.read(file) if file.exists() else {"lines": ["no test has ended"]}


def sanitizer_command(setting: Setting, seconds: float) -> list[str]:
    pretend = ["--pretend"] if setting.pretend else []
    result = [
        "--result",
        str(setting.scratch / "sanitizer.json"),
        "--device",
        setting.device,
        "--seconds",
        str(seconds),
    ]
    return _own("sanitize", *result, *pretend)


def _benchmark(setting: Setting, seconds: float, folder: str, *arguments: str) -> list[str]:
    argv = [sys.executable, "-m", __package__.rpartition(".")[0], *arguments, "--device", setting.device]
    argv += ["--out", str(setting.scratch / folder), "--minutes", f"{0.9 * seconds / 60:.3f}"]
    return argv + (["--commit", setting.commit] if setting.commit else [])


def ops_command(setting: Setting, seconds: float) -> list[str]:
    return _benchmark(setting, seconds, "ops", *(["--quick", "--repeats", "2"] if setting.pretend else []))


def steps_command(setting: Setting, seconds: float) -> list[str]:
    return _benchmark(setting, seconds, "steps", "train_step", *(PRETEND_STEPS if setting.pretend else []))


def dropin_command(setting: Setting, seconds: float) -> list[str]:
    """It has no --minutes: each setting's rounds get a third of its share, checks and warm-up the rest."""
    argv = [sys.executable, "-m", __package__.rpartition(".")[0], "dropin", "--device", setting.device]
    argv += ["--out", str(setting.scratch / "dropin"), "--seconds", f"{seconds / 18:.3f}"]
    argv += ["--size", "quick", "--dtype", "fp32", "--repeats", "2"] if setting.pretend else []
    return argv + (["--commit", setting.commit] if setting.commit else [])


def _found(folder: str, name: str, lines: Callable[[dict], tuple[list[str], list[str]]]) -> Callable[[Setting], dict]:
    """Copies the result file to the user's folder, and makes lines of it."""

    def collect(setting: Setting) -> dict:
        result = written(setting.scratch / folder / name)
        if result is None:
            return {}
        results_file.write(setting.out / name, result)
        told, failures = lines(result)
        return {"file": name, "lines": told, "failures": failures}

    return collect


def training_command(setting: Setting, seconds: float) -> list[str]:
    scratch = setting.scratch / "training"
    scratch.mkdir(exist_ok=True)
    files = ["--result", str(setting.scratch / "training.json"), "--figure", str(setting.out / "training.png")]
    return _own("training", "--device", setting.device, "--seconds", str(seconds), *files, "--scratch", str(scratch))


def sweep_command(setting: Setting, seconds: float) -> list[str]:
    text = setting.text
    if setting.pretend and not text:
        text = (str(corpus("cpu", setting.scratch)),)
    argv = [sys.executable, "-m", __package__.rpartition(".")[0], "sweep", *text]
    argv += ["--preset", "pretend" if setting.pretend else setting.sweep, "--out", str(setting.scratch / "sweep")]
    argv += ["--state", str(setting.out / STATE), "--result", str(setting.scratch / "sweep.json")]
    return [*argv, "--stop-after", f"{max(1.0, seconds - SWEEP_ASIDE_SECONDS) / 60:.3f}"]


def sweep_found(setting: Setting) -> dict:
    for name in ("compare.json", "compare.png"):
        file = setting.scratch / "sweep" / name
        if file.exists():
            (setting.out / name).write_bytes(file.read_bytes())
    result = _result("sweep")(setting)
    return result | {"explained": True} if result.get("failures") else result


PHASES = (
    Phase("build", 1.5, build_command, _result("build"), stretch=2.5, fine=(0,)),
    Phase("tests", 2.5, tests_command, tests_found),
    Phase("sanitizer", 1.0, sanitizer_command, _result("sanitizer"), fine=(0,)),
    Phase("ops", 2.0, ops_command, _found("ops", "ops.json", summary.op_lines)),
    Phase("steps", 1.2, steps_command, _found("steps", "train_step.json", summary.step_lines)),
    Phase("dropin", 0.8, dropin_command, _found("dropin", "dropin.json", summary.dropin_lines)),
    Phase("training", 1.3, training_command, _result("training"), fine=(0,)),
)
SWEEP = Phase("sweep", 8.0, sweep_command, sweep_found)
STATE = "sweep.tar.gz"  # all that the next piece needs; small, but for the tokens beside it


# What is refused before any work.


def check(options: argparse.Namespace) -> None:
    """BadUse, in one line, for everything that would make the run pointless."""
    kind = "pretend" if options.pretend else "real"
    if not options.minutes >= LEAST_MINUTES[kind]:
        raise BadUse(f"--minutes must be at least {LEAST_MINUTES[kind]:g}, got {options.minutes:g}")
    missing = [name for name in NEEDS if not (ROOT / name).exists()]
    if missing:
        raise BadUse(
            f"wants a source tree, which builds the extension and has the tests: no {', '.join(missing)} in {ROOT}"
        )
    for package in ("torch", "pytest", "setuptools"):
        if importlib.util.find_spec(package) is None:
            raise BadUse(f"wants {package}, which {sys.executable} does not have")
    if options.resume and not (options.resume / STATE).is_file():
        raise BadUse(f"--resume must be the folder of an earlier piece, got {options.resume} without {STATE}")
    if not options.pretend:
        _check_gpu()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        raise BadUse(f"--out {options.out} cannot be written: {error.strerror}") from None


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BadUse(f"wants a GPU, torch {torch.__version__} sees none; --pretend runs through everything without one")
    setup = setup_module(ROOT)
    try:
        cuda = setup.find_cuda(os.environ)
    except setup.BuildError as error:
        raise BadUse(str(error)) from None
    if cuda.nvcc is None:
        raise BadUse(f"wants nvcc to build the extension for this GPU: {cuda.why_not}")


# The run.


def everything(options: argparse.Namespace, phases: Sequence[Phase] = PHASES) -> int:
    from ..machine import machine

    end = time.monotonic() + 60 * options.minutes - RESERVE_SECONDS * (0.2 if options.pretend else 1.0)
    out = options.out.resolve()
    device = "cpu" if options.pretend else "cuda"
    file, log = out / "gpu.json", out / "log.txt"
    log.write_bytes(b"")
    result = {
        "format": results_file.FORMAT,
        "kind": "gpu",
        "machine": machine(device, options.commit),
        "pretend": options.pretend,
        "minutes": options.minutes,
        "planned": [phase.name for phase in phases],
        "phases": {},
        "passed": False,
    }
    results_file.write(file, result)
    signal.signal(signal.SIGTERM, _interrupt)
    with (
        tempfile.TemporaryDirectory(prefix="stackbert-gpu-", ignore_cleanup_errors=True) as scratch,
        suppress(KeyboardInterrupt),
    ):
        setting = Setting(ROOT, out, Path(scratch), device, options.pretend, options.commit, **_of_the_sweep(options))
        for i, phase in enumerate(phases):
            seconds = limit(phase, list(phases[i + 1 :]), end - time.monotonic())
            if seconds < 1:
                result["phases"][phase.name] = {
                    "state": CUT_OFF,
                    "seconds": 0,
                    "limit": 0,
                    "reason": "no time was left",
                }
                continue

            def keep(found: dict, name: str = phase.name) -> None:
                result["phases"][name] = found
                results_file.write(file, result)

            keep({"state": RUNNING, "seconds": 0, "limit": round(seconds, 1)})
            print(f"{phase.name}: at most {seconds:.0f} s ...", flush=True)
            keep(run(phase, setting, seconds, log, keep))
            found = result["phases"][phase.name]
            print(
                f"{phase.name}: {found['state']} after {found['seconds']:.0f} s {found.get('reason', '')}".rstrip(),
                flush=True,
            )
    for found in result["phases"].values():
        if found["state"] == RUNNING:
            found |= {"state": CUT_OFF, "reason": "interrupted"}
    states = [found["state"] for found in result["phases"].values()]
    result["passed"] = len(states) == len(phases) and all(state in ("passed", "skipped") for state in states)
    results_file.write(file, result)
    print("\n" + summary.text(result), flush=True)
    return DONE if result["passed"] else FAILED


def _of_the_sweep(options: argparse.Namespace) -> dict:
    text = tuple(str(Path(text).resolve()) for text in getattr(options, "text", ()))
    return {"sweep": getattr(options, "sweep", "small"), "text": text}


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str], prog: str) -> int:
    options = parser(prog).parse_args(arguments)
    check(options)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a run which is ended from outside still sums up
    if options.resume and options.resume.resolve() != options.out.resolve():
        for file in options.resume.glob(f"{STATE}*"):
            shutil.copyfile(file, options.out / file.name)
    chosen = [phase for phase in (*PHASES, SWEEP) if phase.name in (options.phase or [p.name for p in PHASES])]
    return everything(options, chosen)


if __name__ == "__main__":
    sys.exit(answered(main, sys.argv[1:], "benchmarks.gpu"))
