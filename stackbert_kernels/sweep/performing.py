"""Performs pieces of work, as many at a time as the sweep says, and shows how far they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.sweep.settings import NEEDS, Sweep
from stackbert_kernels.sweep.side_by_side import side_by_side
from stackbert_kernels.sweep.work import FILL, TIME, Work, perform
from stackbert_kernels.train.budget import PROBE_STEPS
from stackbert_kernels.train.run_directory import METRICS, read_metrics
from stackbert_kernels.train.run_facts import duration

TIMING = ".timing"
ASIDE = 1.1
"""Evaluation, checkpoints and preparation take a tenth of the training or so."""


def perform_all(
    sweep: Sweep, pieces: Sequence[Work], *, begins: Callable[[Work], None], ended: Callable[[Work, dict], None]
) -> bool:
    """Whether all were performed: False where a signal came between, or where the time was up for the next one."""

    def fits(work: Work) -> bool:
        return time.monotonic() + (ASIDE * work.seconds if work.kind != TIME else 0.0) < sweep.until

    if sweep.jobs == 1:
        for work in pieces:
            if not fits(work):
                return False
            begins(work)
            result = perform(work, progress=sys.stderr.isatty())
            ended(work, result)
            if result["status"] == "stopped":
                return False
        return True
    recipe, options = RECIPES["baseline"]
    shape = recipe(replace(sweep.base, steps=PROBE_STEPS, stages=(), **dict.fromkeys(NEEDS, "")), options())
    return side_by_side(
        pieces,
        sweep.jobs,
        sweep.directory,
        begins=begins,
        ended=ended,
        fits=fits,
        filler=Work(FILL, "filler", shape, sweep.directory / TIMING / "filler"),
        overview=lambda waiting, active: _overview(sweep, waiting, active),
    )


def _overview(sweep: Sweep, waiting: Sequence[Work], active: Sequence[Work]) -> str:
    shares = {work.name: _done(work) for work in active if work.kind != TIME}
    if not shares:
        return ", ".join(work.name for work in active)
    left = sum(work.seconds for work in waiting) + sum((1 - _done(work)) * work.seconds for work in active)
    each = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
    return f"{each}; {len(waiting)} waiting, about {duration(ASIDE * left / sweep.jobs)} to go"


def _done(work: Work) -> float:
    """The share of its time that a run has had."""
    seconds = [
        e["seconds"]
        for out in (work.out, work.first and work.first.out)
        if out
        for e in read_metrics(out / METRICS)[-1:]
    ]
    return min(1.0, sum(seconds) / work.seconds)
