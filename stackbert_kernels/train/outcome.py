"""How a run ends: finished, stopped by a signal, or failed; and what is said of it."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch

from stackbert_kernels.train.console import Console
from stackbert_kernels.train.export import export, exportable, exported
from stackbert_kernels.train.report import write_report
from stackbert_kernels.train.run_directory import REPORT, Run, read_metrics
from stackbert_kernels.train.state import State, restore, stage_seconds


@contextmanager
def stop_signals():
    """A list that the first SIGTERM or SIGINT is put into, so that the step is finished and saved; a second one acts at once."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, _):
        received.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _figures(run: Run, state: State) -> dict:
    return {
        "out": str(run.directory),
        "step": state.step,
        "steps": run.config.steps,
        "tokens": state.tokens,
        "flops": state.flops,
        "seconds": state.seconds,
        "skipped": state.skipped,
        **state.eval,
        "stage_seconds": stage_seconds(state, run.config),
    }


def stopped_result(run: Run, state: State, path: Path, by: str) -> dict:
    message = f"stopped by {by} after step {state.step} of {run.config.steps}, saved in {path}; the same command goes on from there"
    return {"status": "stopped", "message": message, **_figures(run, state)}


def failed_result(run: Run, state: State, path: Path) -> dict:
    message = (
        f"stopped at step {state.step}: {state.skipped_in_row} steps in a row had a loss or gradient that is not finite; "
        f"parameters from before them are saved in {path}; a lower --lr in another --out may help"
    )
    return {"status": "failed", "message": message, **_figures(run, state)}


def already_finished_result(run: Run, progress: bool) -> dict:
    """Makes up for what could not be written then: transformers may have been installed since."""
    with Console(run.config.steps, shown=progress) as console:
        if not exported(run) and exportable(run, console):
            model, *_ = restore(run, torch.device("cpu"), console)
            export(run, model)
    if not (run.directory / REPORT).exists():
        write_report(run.directory)
    return finished_result(run, f"this run was already finished: {run.directory}")


def finished_result(run: Run, message: str) -> dict:
    end = next(event for event in reversed(read_metrics(run.metrics)) if event["event"] == "end")
    figures = {name: value for name, value in end.items() if name not in ("event", "stage", "depth", "train_from")}
    return {
        "status": "finished",
        "message": message,
        "out": str(run.directory),
        "steps": run.config.steps,
        **figures,
        "model": str(run.model) if exported(run) else None,
        "report": str(run.directory / REPORT),
    }
