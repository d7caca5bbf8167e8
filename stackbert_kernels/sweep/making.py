"""Runs as pieces of work, each with the model that it needs before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from stackbert_kernels.compare.runs import SOURCES
from stackbert_kernels.config import ConfigError, TrainConfig
from stackbert_kernels.sweep.performing import TIMING, perform_all
from stackbert_kernels.sweep.record import Record, Timed, write
from stackbert_kernels.sweep.settings import Sweep, Timing
from stackbert_kernels.sweep.work import TIME, TRAIN, First, Work
from stackbert_kernels.train.budget import PROBE_STEPS


def made(sweep: Sweep, method: str, config: TrainConfig, source: TrainConfig | None, run: Path, *, name: str) -> Work:
    """The run of a method in the directory `run`, which trains its source first if it has one of its own."""
    first = (
        First(sweep.makes(method), replace(source, seed=config.seed), run.parent / SOURCES / run.name)
        if source
        else None
    )
    return Work(TRAIN, name, config, run, sweep.seconds, first)


def timed(sweep: Sweep, record: Record, methods: Sequence[str], say: Callable[[str], None]) -> tuple[Record, bool]:
    """The record with the seconds a step of each method, and the runs whose steps fill the budget; False where a signal came between."""

    def ended(work: Work, result: dict) -> None:
        nonlocal record
        method = work.out.name
        if result["status"] == "finished":
            timing = Timing(tuple(result["stage_seconds"]), tuple(result.get("first_seconds", ())))
            try:
                record = record.with_method(method, Timed(sweep.seconds, timing, *sweep.fitted(method, timing)))
            except ConfigError as error:
                raise ConfigError(f"sweep: {method} in {sweep.seconds / 60:g} minutes: {error}") from None
            write(sweep.directory, record)
        elif result["status"] != "stopped":
            why = result["message"].partition(";")[0]
            raise ConfigError(f"sweep: {method} does not get through its first steps: {why}")

    pieces = []
    for method in methods:
        place, setting = sweep.directory / TIMING, sweep.makes(method)
        first = First(setting, sweep.source_config(method, PROBE_STEPS), place / SOURCES / method) if setting else None
        config = sweep.config(method, PROBE_STEPS)
        pieces.append(Work(TIME, f"timing {method}", config, place / method, sweep.seconds, first))
    done = perform_all(sweep, pieces, begins=lambda work: say(f"{work.name}, every stage"), ended=ended)
    return record, done
