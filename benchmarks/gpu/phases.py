"""A phase is a command that runs in a session of its own, is killed with all its children when its time is up, and leaves what it found
in files. What it had found by then counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, SKIPPED, CUT_OFF, RUNNING = "passed", "failed", "skipped", "cut off", "running"

POLL_SECONDS = 0.5
COLLECT_SECONDS = 5.0  # between looks at the results of a running phase
LOG_BYTES = 2 << 20  # of a phase: what a tool repeats a million times must not crowd out the rest


@dataclass(frozen=True)
class Setting:
    """What every phase is told."""

    root: Path  # of the source tree: the working directory
    out: Path  # results for the user
    scratch: Path  # a folder of this run, removed at its end
    device: str  # "cuda", or "cpu" to pretend
    pretend: bool
    commit: str | None
    sweep: str = "small"  # preset of the sweep
    text: tuple[str, ...] = ()  # that it reads


@dataclass(frozen=True)
class Phase:
    """
    share     of the minutes, in relation to the other phases'
    stretch   how many times its share it may use at most: a phase on which the others depend is not cut where they could wait
    command   (setting, seconds) -> arguments
    collect   setting -> what the phase has found so far, as JSON values. Known keys: "lines", for the summary; "failures", one a line;
              "skipped", the reason why nothing ran; "explained", where exit status 1 means no more than these say
    fine      exit statuses with which the command has done its work; whether that is good, "failures" says
    """

    name: str
    share: float
    command: Callable[[Setting, float], list[str]]
    collect: Callable[[Setting], dict]
    stretch: float = 1.0
    fine: tuple[int, ...] = (0, 1)


def limit(phase: Phase, later: list[Phase], seconds_left: float) -> float:
    """Its part of the time that is left to it and the later phases: what earlier ones did not use flows on."""
    part = phase.share / (phase.share + sum(p.share for p in later))
    return min(seconds_left, seconds_left * part * phase.stretch)


def run(phase: Phase, setting: Setting, seconds: float, log: Path, changed: Callable[[dict], None]) -> dict:
    """The phase's result; `changed` gets what it has found so far, every few seconds."""
    started = time.monotonic()

    def found(state: str, **more) -> dict:
        taken = round(time.monotonic() - started, 1)
        return {"state": state, "seconds": taken, "limit": round(seconds, 1), **_collected(phase, setting), **more}

    with log.open("ab") as file:
        file.write(f"\n===== {phase.name}: at most {seconds:.0f} s =====\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            phase.command(setting, seconds),
            cwd=setting.root,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = _wait(process, started + seconds, lambda: changed(found(RUNNING)))
        finally:
            _end_session(process)
    tail = _shorten(log, start)
    if status is None:
        return found(CUT_OFF, reason=f"its {seconds:.0f} s were up")
    if status not in phase.fine:
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return found(FAILED, reason=f"{how}: {tail}")
    result = found(PASSED)
    if result.get("failures"):
        result["state"] = FAILED
    elif status and not result.get("explained"):
        result |= {"state": FAILED, "reason": f"exit status {status}: {tail}"}
    elif result.get("skipped"):
        result["state"] = SKIPPED
    return result


def written(path: Path) -> dict | None:
    """The JSON object in a file that a phase replaces as a whole, or None before it has written any."""
    return json.loads(path.read_text()) if path.exists() else None


def _collected(phase: Phase, setting: Setting) -> dict:
    """Results are read while another process writes them, or after it died writing: then they are not there yet."""
    try:
        return phase.collect(setting)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"unreadable": f"{type(error).__name__}: {error}"}


def _wait(process: subprocess.Popen, until: float, look: Callable[[], None]) -> int | None:
    """The exit status, or None where the time was up."""
    looked = time.monotonic()
    while True:
        left = until - time.monotonic()
        try:
            return process.wait(timeout=max(0.0, min(POLL_SECONDS, left)))
        except subprocess.TimeoutExpired:
            if left <= 0:
                return None
        if time.monotonic() - looked >= COLLECT_SECONDS:
            look()
            looked = time.monotonic()


def _end_session(process: subprocess.Popen) -> None:
    """Whatever is left of it: a child that outlives its phase would hold the GPU."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shorten(log: Path, start: int) -> str:
    """Cuts the middle out of what a phase wrote where it is very long. Returns its last line."""
    with log.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() - start > LOG_BYTES:
            file.seek(start)
            head = file.read(LOG_BYTES // 2)
            file.seek(-LOG_BYTES // 2, os.SEEK_END)
            tail = file.read()
            file.seek(start)
            file.write(head + b"\n[... cut: too long ...]\n" + tail)
            file.truncate()
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return " ".join(lines[-1].split())[:200] if lines else "it wrote nothing"
