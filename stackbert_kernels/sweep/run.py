"""The sweep itself: times the methods, makes the runs, compares them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from stackbert_kernels.compare.comparison import compare
from stackbert_kernels.compare.output import write as write_comparison
from stackbert_kernels.compare.runs import SWEEP
from stackbert_kernels.config import ConfigError
from stackbert_kernels.data.prepare import load_manifest, prepare
from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.sweep.check import ASIDE, finished, same_load
from stackbert_kernels.sweep.record import Record, Timed, read, write
from stackbert_kernels.sweep.settings import Sweep
from stackbert_kernels.sweep.side_by_side import LOGS, side_by_side
from stackbert_kernels.sweep.work import FILL, TIME, TRAIN, Work, perform
from stackbert_kernels.train.budget import PROBE_STEPS, enough, steps_that_fit
from stackbert_kernels.train.run_directory import DATA, METRICS, read_metrics
from stackbert_kernels.train.run_facts import duration

TIMING = ".timing"


def remove(sweep: Sweep) -> None:
    """What an earlier sweep wrote, and nothing else."""
    known = read(sweep.directory)
    for method in known.methods if known else ():
        for run in sweep.directory.glob(f"{method}-seed*"):
            if run.name.removeprefix(f"{method}-seed").isdigit():
                shutil.rmtree(run)
    for name in (DATA, LOGS, TIMING):
        shutil.rmtree(sweep.directory / name, ignore_errors=True)
    for name in (SWEEP, "compare.json", "compare.png"):
        (sweep.directory / name).unlink(missing_ok=True)


def run_sweep(sweep: Sweep, *, say: Callable[[str], None]) -> dict:
    """Times, trains and compares. Returns status "finished", "failed" (of the runs in `failed`) or "stopped", and the comparison so far."""
    out = sweep.directory
    out.mkdir(parents=True, exist_ok=True)
    record = _begun(sweep)
    data = prepare(sweep.base.data.text, out / DATA, sweep.base.data, progress=sys.stderr.isatty())
    model = replace(sweep.base.model, vocab_size=load_manifest(data)["vocab_size"])
    sweep = replace(
        sweep, base=replace(sweep.base, model=model, data=replace(sweep.base.data, text=(str(data.resolve()),)))
    )

    runs, waiting = sweep.runs(), []
    for number, (method, seed, run) in enumerate(runs, 1):
        if finished(run):
            say(f"{_place(number, len(runs), method, seed)}: finished before, {_score(run)}")
        else:
            waiting.append((number, method, seed, run))
    try:
        methods = dict.fromkeys(method for _, method, _, _ in waiting if method not in record.methods)
        record = _timed(sweep, record, methods, say)
        return _trained(sweep, record, waiting, say) if record else _result(sweep, "stopped", [])
    finally:
        shutil.rmtree(out / TIMING, ignore_errors=True)


def _begun(sweep: Sweep) -> Record:
    """What an earlier command recorded, or a record of the load that there will be."""
    import torch

    threads = sweep.base.threads or torch.get_num_threads()
    record = read(sweep.directory)
    if record:
        same_load(sweep, record, threads)
    if not record or not record.methods:
        record = Record(sweep.jobs, threads)
        write(sweep.directory, record)
    return record


def _timed(sweep: Sweep, record: Record, methods: Sequence[str], say: Callable[[str], None]) -> Record | None:
    """Seconds a step of each stage of the methods, and the configurations whose steps fill the budget; None where a signal came between."""

    def ended(work: Work, result: dict) -> None:
        nonlocal record
        method = work.out.name
        if result["status"] == "finished":
            record = record.with_method(method, _filling(sweep, method, result["stage_seconds"]))
            write(sweep.directory, record)
        elif result["status"] != "stopped":
            why = result["message"].partition(";")[0]
            raise ConfigError(f"sweep: {method} does not get through its first steps: {why}")

    pieces = [
        Work(TIME, f"timing {m}", sweep.config(m, PROBE_STEPS), sweep.directory / TIMING / m, sweep.seconds)
        for m in methods
    ]
    done = _all(sweep, pieces, begins=lambda work: say(f"{work.name}, every stage"), ended=ended)
    return record if done else None


def _filling(sweep: Sweep, method: str, seconds_per_step: Sequence[float]) -> Timed:
    recipe = sweep.recipe(method)
    try:
        steps = enough(steps_that_fit(recipe, seconds_per_step, sweep.seconds), sweep.seconds)
        return Timed(sweep.seconds, tuple(seconds_per_step), recipe(steps))
    except ConfigError as error:
        raise ConfigError(f"sweep: {method} in {sweep.seconds / 60:g} minutes: {error}") from None


def _trained(
    sweep: Sweep, record: Record, waiting: Sequence[tuple[int, str, int, Path]], say: Callable[[str], None]
) -> dict:
    failed, total = [], len(sweep.runs())
    places = {run: _place(number, total, method, seed) for number, method, seed, run in waiting}

    def begins(work: Work) -> None:
        later = len(waiting) - 1 - list(places).index(work.out)
        left = duration(later * sweep.seconds / sweep.jobs)
        say(f"{places[work.out]}: {work.config.steps:,} steps in about {duration(sweep.seconds)}; then {left} to go")

    def ended(work: Work, result: dict) -> None:
        if result["status"] in ("failed", "crashed"):
            failed.append(str(work.out))
        say(f"{places[work.out]}: {_score(work.out) if result['status'] == 'finished' else result['message']}")

    pieces = [
        Work(TRAIN, f"{method} seed {seed}", replace(record.methods[method].config, seed=seed), run)
        for _, method, seed, run in waiting
    ]
    if not _all(sweep, pieces, begins=begins, ended=ended):
        return _result(sweep, "stopped", failed)
    return _result(sweep, "failed" if failed else "finished", failed)


def _all(
    sweep: Sweep, pieces: Sequence[Work], *, begins: Callable[[Work], None], ended: Callable[[Work, dict], None]
) -> bool:
    """Performs `pieces`, as many at a time as the sweep says; False where a signal came between."""
    if sweep.jobs == 1:
        for work in pieces:
            begins(work)
            result = perform(work, progress=sys.stderr.isatty())
            ended(work, result)
            if result["status"] == "stopped":
                return False
        return True
    recipe, options = RECIPES["baseline"]
    shape = recipe(replace(sweep.base, steps=PROBE_STEPS, stages=(), source=""), options())
    filler = Work(FILL, "filler", shape, sweep.directory / TIMING / "filler")

    def overview(active: Sequence[Work]) -> str:
        return _overview(sweep, len(pieces), active)

    return side_by_side(
        pieces, sweep.jobs, sweep.directory, begins=begins, ended=ended, filler=filler, overview=overview
    )


def _overview(sweep: Sweep, pieces: int, active: Sequence[Work]) -> str:
    if any(work.kind == TIME for work in active):
        return ", ".join(work.name for work in active)
    runs = sweep.runs()
    done = sum(finished(run) for _, _, run in runs)
    steps = {work.name: (_step(work.out), work.config.steps) for work in active}
    left = len(runs) - done - sum(step / steps for step, steps in steps.values())
    each = ", ".join(f"{name} {100 * step // steps}%" for name, (step, steps) in steps.items())
    return f"{done} of {len(runs)} runs finished, about {duration(ASIDE * left * sweep.seconds / sweep.jobs)} to go: {each}"


def _step(run: Path) -> int:
    return max((event.get("step", 0) for event in read_metrics(run / METRICS)[-1:]), default=0)


def _place(number: int, total: int, method: str, seed: int) -> str:
    return f"[{number}/{total}] {method} seed {seed}"


def _score(run: Path) -> str:
    end = next(event for event in reversed(read_metrics(run / METRICS)) if event["event"] == "end")
    loss = end.get("eval_loss")
    return f"held-out loss {'not finite' if loss is None else f'{loss:.3f}'} after {end['step']:,} steps, {duration(end['seconds'])}"


def _result(sweep: Sweep, status: str, failed: Sequence[str]) -> dict:
    """With the comparison of what there is to compare, written beside the runs."""
    result = {
        "status": status,
        "out": str(sweep.directory),
        "failed": list(failed),
        "comparison": None,
        "why_none": None,
    }
    there = [run for _, _, run in sweep.runs() if (run / METRICS).exists()]
    try:
        if not there:
            raise ConfigError("no run has begun")
        result["comparison"] = compare(there)
    except ConfigError as error:
        result["why_none"] = str(error)
    else:
        write_comparison(result["comparison"], sweep.directory)
    return result
