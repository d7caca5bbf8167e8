"""The rate of each method, by runs of a shorter budget with the first seed, each with its whole schedule."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace

from stackbert_kernels.config import ConfigError
from stackbert_kernels.sweep.making import made
from stackbert_kernels.sweep.performing import perform_all
from stackbert_kernels.sweep.record import Record, Timed, Trial, Tuned, write
from stackbert_kernels.sweep.settings import Sweep
from stackbert_kernels.sweep.work import Work
from stackbert_kernels.train.run_directory import CHECKPOINTS, METRICS, MODEL, read_metrics
from stackbert_kernels.train.run_facts import duration


def tune(sweep: Sweep, record: Record, say: Callable[[str], None]) -> tuple[Record, bool]:
    """The record with the best rate of each method and the runs that follow from it; False where a signal came between.

    A method of which a trial crashed has no rate yet.
    """
    trials = sweep.trials()
    tuned = dict.fromkeys(method for method, _, _ in trials)
    for method in tuned:
        if method not in record.tuning:
            record = record.with_tuning(method, Tuned(sweep.tune, sweep.tune_seconds, sweep.base.seed))
    places, pieces = {}, []
    for number, (method, rate, run) in enumerate(trials, 1):
        places[run] = (f"[tuning {number}/{len(trials)}] {method} at {rate:g}", method, rate)
        if any(trial.lr == rate for trial in record.tuning[method].tried):
            continue
        trial = sweep.trial(method, rate)
        try:
            config, source = trial.fitted(method, record.methods[method].timing)
        except ConfigError as error:
            raise ConfigError(f"sweep: {method} in {sweep.tune_seconds / 60:g} minutes of --tune: {error}") from None
        pieces.append(made(trial, method, config, source, run, name=f"{method} at {rate:g}"))

    def begins(work: Work) -> None:
        say(f"{places[work.out][0]}: {work.config.steps:,} steps in about {duration(sweep.tune_seconds)}")

    def ended(work: Work, result: dict) -> None:
        nonlocal record
        place, method, rate = places[work.out]
        if result["status"] not in ("finished", "failed"):
            say(f"{place}: {result['message']}")
            return
        trial = _trial(rate, work)
        found, known = record.tuning[method].with_trial(trial), record.methods[method]
        record = record.with_tuning(method, found)
        if found.lr is not None:
            final = replace(sweep, rates=sweep.rates | {method: found.lr})
            record = record.with_method(method, Timed(known.seconds, known.timing, *final.fitted(method, known.timing)))
        write(sweep.directory, record)
        for part in (CHECKPOINTS, MODEL):  # many models that nobody asked for
            shutil.rmtree(work.out / part, ignore_errors=True)
        if work.first:
            shutil.rmtree(work.first.out, ignore_errors=True)
        loss = (
            f"held-out loss {trial.loss:.3f}"
            if trial.loss is not None
            else f"diverged: {result['message'].partition(';')[0]}"
        )
        say(f"{place}: {loss}")

    if not perform_all(sweep, pieces, begins=begins, ended=ended):
        return record, False
    for method in tuned:
        found = record.tuning[method]
        if found.lr is None:
            say(f"{method}: a trial has no result, so its runs are left out; the same command makes it again")
        else:
            say(f"{method}: rate {found.lr:g}{at_edge(found)}")
    return record, True


def with_rates(sweep: Sweep, record: Record) -> Sweep:
    """The sweep with the rates that were found."""
    found = {m: record.tuning[m].lr for m, _, _ in sweep.trials() if m in record.tuning and record.tuning[m].lr}
    return replace(sweep, rates=sweep.rates | found)


def at_edge(tuned: Tuned) -> str:
    """What keeps the best rate from being the best there is."""
    if all(trial.loss is None for trial in tuned.tried):
        return ", the lowest of those tried, which all diverged"
    if not any(trial.learned for trial in tuned.tried):
        return ", but at none did it get below the loss without context: longer trials (--tune-minutes) may tell them apart"
    for edge, word in ((min, "lowest"), (max, "highest")):
        if len(tuned.rates) > 1 and tuned.lr == edge(tuned.rates):
            return f", the {word} of those tried: a {word.replace('est', 'er')} one may be better"
    return ""


def _trial(rate: float, work: Work) -> Trial:
    events = read_metrics(work.out / METRICS)
    end = next((event for event in reversed(events) if event["event"] == "end"), None)
    loss = end.get("eval_loss") if end else None
    seconds = events[-1]["seconds"] if events else None
    loss = loss if loss is not None and math.isfinite(loss) else None
    return Trial(rate, work.config.steps, loss, seconds, end.get("unigram_loss") if end else None)
