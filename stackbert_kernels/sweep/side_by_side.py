"""Several pieces of work at a time, each in a process of its own on cores of its own.

While one that counts is there, the slots that have nothing left to do are kept as busy by a timing without end: seconds are only
comparable under the same load. A process that ends without a result is reported with the last lines of its log, and the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stackbert_kernels.sweep.work import FILL, Work
from stackbert_kernels.train.run_directory import write_json

POLL_SECONDS = 0.05
SECONDS_BETWEEN_OVERVIEWS = 1.0
LAST_LINES = 5
LOGS = ".logs"
COMMAND = (sys.executable, "-P", "-m", "stackbert_kernels.sweep.process")


def cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def side_by_side(
    pieces: Sequence[Work],
    jobs: int,
    directory: Path,
    *,
    begins: Callable[[Work], None],
    ended: Callable[[Work, dict], None],
    fits: Callable[[Work], bool],
    filler: Work,
    overview: Callable[[Sequence[Work], Sequence[Work]], str],
) -> bool:
    """Performs `pieces` in their order; False where a signal came between, after which each has saved what it had, or where the next
    one did not fit into the time any more.

    `ended` gets what perform() returned, or status "crashed" and why. `overview` makes the line that a terminal shows meanwhile, of the work
    that waits and that which is being done.
    """
    logs = directory / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    waiting, active, line = list(pieces), {}, _Line()
    fills, told, late = True, 0, False
    own = cores()
    share = max(1, len(own) // jobs)
    try:
        with _signals() as received:
            while waiting or any(child.work.kind != FILL for child in active.values()):
                if len(received) > told:
                    told = len(received)
                    waiting.clear()
                    for child in active.values():
                        child.process.send_signal(signal.SIGTERM if told == 1 else signal.SIGKILL)
                for slot in range(jobs):
                    if slot in active or told:
                        continue
                    if waiting and not fits(waiting[0]):
                        waiting.clear()
                        late = True
                    if waiting:
                        work = waiting.pop(0)
                        line.clear()
                        begins(work)
                    elif not fills or all(child.work.kind == FILL for child in active.values()):
                        continue
                    else:
                        work = replace(filler, name=f"filler {slot}", out=filler.out / str(slot))
                    first = slot * share % len(own)
                    active[slot] = _Child(work, own[first : first + share], logs)
                line.show(lambda: overview(waiting, [c.work for c in active.values() if c.work.kind != FILL]))
                time.sleep(POLL_SECONDS)
                for slot, child in list(active.items()):
                    if child.process.poll() is None:
                        continue
                    del active[slot]
                    result = child.result(stopped=told > 0)
                    line.clear()
                    if child.work.kind == FILL:
                        fills = False  # it came to no end: another one would not do better
                    else:
                        ended(child.work, result)
    finally:
        line.clear()
        for child in active.values():
            child.process.kill()
        for child in active.values():
            child.process.wait()
            child.result(stopped=True)
        shutil.rmtree(filler.out, ignore_errors=True)
    return not told and not late


class _Child:
    """A process with its work, which lies in a file for it, and its log."""

    def __init__(self, work: Work, cores: Sequence[int], logs: Path):
        self.work = work
        label = work.name.replace(" ", "-")
        self.log, self.given, self.written = (logs / f"{label}{end}" for end in (".log", ".work.json", ".result.json"))
        self.written.unlink(missing_ok=True)
        write_json(self.given, {"work": work.plain(), "cores": list(cores)})
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        threads = {"OMP_NUM_THREADS": str(work.config.threads)} if work.config.threads else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, str(self.given), str(self.written)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | threads,
                start_new_session=True,  # a Ctrl-C of the terminal is for the sweep, which passes it on once
            )

    def result(self, *, stopped: bool) -> dict:
        """Of a process that has ended; its files but for the log are removed."""
        status = self.process.wait()
        self.process.stdin.close()
        try:
            return json.loads(self.written.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if stopped:
                return {"status": "stopped", "message": "stopped before its first step was saved"}
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            said = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:])
            why = f"its process ended without a result ({how}): {said or 'it wrote nothing'}"
            return {"status": "crashed", "message": f"{why}; {self.log}"}
        finally:
            self.given.unlink(missing_ok=True)
            self.written.unlink(missing_ok=True)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT, in the order of their coming."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Line:
    """One line of a terminal that is written over; nothing elsewhere."""

    def __init__(self):
        self.terminal, self.shown, self.last = sys.stderr.isatty(), False, 0.0

    def show(self, text: Callable[[], str]) -> None:
        if self.terminal and time.monotonic() - self.last >= SECONDS_BETWEEN_OVERVIEWS:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text()[:width]}", end="", file=sys.stderr, flush=True)
            self.shown, self.last = True, time.monotonic()

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self.shown, self.last = False, 0.0
