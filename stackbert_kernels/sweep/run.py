"""The sweep itself: times the methods, finds their rates, makes the runs, compares them."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from stackbert_kernels.compare.comparison import compare
from stackbert_kernels.compare.output import write as write_comparison
from stackbert_kernels.compare.runs import SOURCES, SWEEP
from stackbert_kernels.config import ConfigError
from stackbert_kernels.data.prepare import load_manifest, prepare
from stackbert_kernels.sweep.check import same_load
from stackbert_kernels.sweep.making import made, timed
from stackbert_kernels.sweep.performing import TIMING, perform_all
from stackbert_kernels.sweep.record import Record, read, write
from stackbert_kernels.sweep.settings import TUNING, Sweep
from stackbert_kernels.sweep.side_by_side import LOGS
from stackbert_kernels.sweep.tuning import tune
from stackbert_kernels.sweep.work import Work, finished
from stackbert_kernels.train.run_directory import DATA, METRICS, read_metrics
from stackbert_kernels.train.run_facts import duration


def remove(sweep: Sweep) -> None:
    """What an earlier sweep wrote, and nothing else."""
    known = read(sweep.directory)
    for method in known.methods if known else ():
        for run in sweep.directory.glob(f"{method}-seed*"):
            if run.name.removeprefix(f"{method}-seed").isdigit():
                shutil.rmtree(run)
    for name in (DATA, SOURCES, TUNING, LOGS, TIMING):
        shutil.rmtree(sweep.directory / name, ignore_errors=True)
    for name in (SWEEP, "compare.json", "compare.png"):
        (sweep.directory / name).unlink(missing_ok=True)


def run_sweep(sweep: Sweep, *, say: Callable[[str], None]) -> dict:
    """Times, tunes, trains and compares. Returns status "finished", "failed" (of the runs in `failed`) or "stopped" (by a signal, or no
    time was left for the next run), and the comparison so far."""
    out = sweep.directory
    out.mkdir(parents=True, exist_ok=True)
    record = _begun(sweep)
    data = prepare(sweep.base.data.text, out / DATA, sweep.base.data, progress=sys.stderr.isatty())
    manifest = load_manifest(data)
    model = replace(sweep.base.model, vocab_size=manifest["vocab_size"])
    sweep = replace(
        sweep, base=replace(sweep.base, model=model, data=replace(sweep.base.data, text=(str(data.resolve()),)))
    )

    tokens = hashlib.sha256(
        " ".join(sorted(file["sha256"] for file in manifest["files"].values())).encode()
    ).hexdigest()
    if record.methods and record.tokens not in ("", tokens):
        raise ConfigError(f"{out} holds runs of other tokens than {data}; take another --out, or --fresh")
    record = replace(record.with_text(sweep.base.data.text), tokens=tokens)
    write(out, record)

    runs, waiting = sweep.runs(), []
    for number, (method, seed, run) in enumerate(runs, 1):
        place = f"[{number}/{len(runs)}] {method} seed {seed}"
        if finished(run):
            say(f"{place}: finished before, {_score(run)}")
        else:
            waiting.append((place, method, seed, run))
    try:
        methods = dict.fromkeys(method for _, method, _, _ in waiting)
        record, done = timed(sweep, record, [m for m in methods if m not in record.methods], say)
        untuned = {m for m, _, _ in sweep.trials() if m in methods}
        if done and not all(_has_rate(record, m) for m in untuned):
            record, done = tune(sweep, record, say)
        failed = [str(run) for _, m, _, run in waiting if done and m in untuned and not _has_rate(record, m)]
        done = done and _trained(sweep, record, [run for run in waiting if str(run[3]) not in failed], failed, say)
    finally:
        shutil.rmtree(out / TIMING, ignore_errors=True)
    return _result(sweep, "stopped" if not done else "failed" if failed else "finished", failed)


def _has_rate(record: Record, method: str) -> bool:
    return method in record.tuning and record.tuning[method].lr is not None


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


def _trained(
    sweep: Sweep,
    record: Record,
    waiting: Sequence[tuple[str, str, int, Path]],
    failed: list[str],
    say: Callable[[str], None],
) -> bool:
    """Whether all runs were made, those in `failed` included."""
    places = {run: place for place, _, _, run in waiting}

    def begins(work: Work) -> None:
        later = len(waiting) - 1 - list(places).index(work.out)
        left = duration(later * sweep.seconds / sweep.jobs)
        say(f"{places[work.out]}: {work.config.steps:,} steps in about {duration(sweep.seconds)}; then {left} to go")

    def ended(work: Work, result: dict) -> None:
        if result["status"] in ("failed", "refused", "crashed"):
            failed.append(str(work.out))
        say(f"{places[work.out]}: {_score(work.out) if result['status'] == 'finished' else result['message']}")

    pieces = []
    for _, method, seed, run in waiting:
        known = record.methods[method]
        config = replace(known.config, seed=seed)
        pieces.append(made(sweep, method, config, known.source, run, name=f"{method} seed {seed}"))
    return perform_all(sweep, pieces, begins=begins, ended=ended)


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
        result["comparison"] = compare(there, skip_begun=True)
    except ConfigError as error:
        result["why_none"] = str(error)
    else:
        write_comparison(result["comparison"], sweep.directory)
    return result
