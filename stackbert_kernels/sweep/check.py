"""What can be wrong with a sweep, found before any work, and its plan for a person. Loads no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stackbert_kernels.compare.comparison import evaluated_otherwise
from stackbert_kernels.compare.runs import SWEEP
from stackbert_kernels.config import ConfigError, TrainConfig, differences
from stackbert_kernels.data.prepare import is_prepared
from stackbert_kernels.plan import plan, span_cost
from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.sweep.record import Record, Timed, read
from stackbert_kernels.sweep.settings import Sweep
from stackbert_kernels.sweep.side_by_side import cores
from stackbert_kernels.train.budget import PROBE_STEPS
from stackbert_kernels.train.run_directory import DATA, METRICS, check, read_metrics
from stackbert_kernels.train.run_facts import duration

ASIDE = 1.1
"""Evaluation, checkpoints and preparation take a tenth of the training or so."""


def checked(sweep: Sweep, *, fresh: bool = False) -> Sweep:
    """Looks at everything that can be wrong before work begins and changes nothing; ConfigError in one line.

    An earlier sweep of other settings is refused unless `fresh`. Returns the sweep with absolute paths in `base`, and with the threads that
    each of several runs at a time has.
    """
    if not sweep.methods:
        raise ConfigError(f"sweep: wanted at least one recipe of {', '.join(RECIPES)}, got none")
    for method in sweep.methods:
        if method not in RECIPES:
            raise ConfigError(f"sweep: recipes must be of {', '.join(RECIPES)}, got {method!r}")
    for what, names in (("--lr", sweep.rates), ("options", sweep.options)):
        stray = [name for name in names if name not in sweep.methods]
        if stray:
            raise ConfigError(f"sweep: {what} of {stray[0]} given, but the recipes are {', '.join(sweep.methods)}")
    if len(set(sweep.methods)) < len(sweep.methods):
        raise ConfigError(f"sweep: each recipe once, got {', '.join(sweep.methods)}")
    if sweep.seeds < 1:
        raise ConfigError(f"sweep: seeds must be >= 1, got {sweep.seeds}")
    if not 0 < sweep.seconds < float("inf"):
        raise ConfigError(f"sweep: minutes must be > 0, got {sweep.seconds / 60:g}")
    if not 0 < sweep.warmup < 1:
        raise ConfigError(f"sweep: warmup_share must be in (0, 1), got {sweep.warmup:g}")
    sweep = _with_threads(sweep)
    first, *others = ((method, sweep.config(method, PROBE_STEPS)) for method in sweep.methods)
    for method, config in others:
        differing = evaluated_otherwise(config, first[1])
        if differing:
            raise ConfigError(
                f"sweep: {method} would be evaluated in another way than {first[0]}: {', '.join(differing)}; give all of them the same"
            )
    out = sweep.directory
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out must be a directory, got a file: {out}")
    ours = (SWEEP, DATA, "text")
    foreign = sorted(p.name for p in out.iterdir() if p.name not in ours and p.name[0] != ".") if out.is_dir() else []
    if foreign and not (out / SWEEP).is_file():
        raise ConfigError(
            f"out must be new, empty or the directory of a sweep, got {out} with {foreign[0]} and no {SWEEP}"
        )
    base = check(sweep.base, out / ".nothing")
    sweep = replace(sweep, base=base)
    known = (not fresh and read(out)) or Record()
    same_load(sweep, known, sweep.base.threads)
    for method in sweep.methods:
        if method in known.methods:
            _same(sweep, method, known.methods[method])
    return sweep


def _with_threads(sweep: Sweep) -> Sweep:
    """Of several runs at a time, each has its part of the cores."""
    if sweep.jobs < 1:
        raise ConfigError(f"sweep: jobs must be >= 1, got {sweep.jobs}")
    here = len(cores())
    if sweep.jobs == 1:
        return sweep
    if sweep.jobs > here:
        raise ConfigError(f"sweep: jobs must be <= {here}, the cores that are here, got {sweep.jobs}")
    threads = sweep.base.threads or here // sweep.jobs
    if threads * sweep.jobs > here:
        raise ConfigError(
            f"sweep: jobs x threads must be <= {here}, the cores that are here, got {sweep.jobs} x {threads}"
        )
    return replace(sweep, base=replace(sweep.base, threads=threads))


def same_load(sweep: Sweep, known: Record, threads: int) -> None:
    """ConfigError where what was timed had another part of the machine; `threads` 0 = not known yet."""
    if not known.methods:
        return
    there, wanted = (known.jobs, known.threads or threads), (sweep.jobs, threads or known.threads)
    if there != wanted:
        raise ConfigError(
            f"{sweep.directory} was timed with {_load(*there)}, wanted {_load(*wanted)}: their seconds cannot be compared; "
            "take the same, another --out, or --fresh"
        )


def _load(jobs: int, threads: int | None) -> str:
    return f"{jobs} run{'s' * (jobs > 1)} at a time" + (
        f", {threads} thread{'s' * (threads > 1)} each" if threads else ""
    )


def _same(sweep: Sweep, method: str, entry: Timed) -> None:
    """ConfigError unless the sweep that began here would have made the same runs of `method`."""
    there: TrainConfig = entry.config
    wanted = sweep.config(method, there.steps)
    wanted = replace(
        wanted,
        model=replace(wanted.model, vocab_size=wanted.model.vocab_size or there.model.vocab_size),
        data=replace(wanted.data, text=(str(_shards(sweep).resolve()),)),
    )
    differing = differences(there, wanted)
    if entry.seconds != sweep.seconds:
        differing.append(f"minutes: {entry.seconds / 60:g} -> {sweep.seconds / 60:g}")
    if differing:
        raise ConfigError(f"{sweep.directory} holds {method} with other settings: {'; '.join(differing)} (there -> wanted); take another --out, or --fresh")  # fmt: skip


def _shards(sweep: Sweep) -> Path:
    """Where the tokens are: `prepare` puts them there, and refuses the directory if they are of another text."""
    text = sweep.base.data.text
    return Path(text[0]) if len(text) == 1 and is_prepared(text[0]) else sweep.directory / DATA


def outline(sweep: Sweep) -> str:
    """The plan for a person, before anything was timed."""
    known = read(sweep.directory) or Record()
    rows = [["recipe", "rate", "runs", "minutes each", "stages", "a step costs", "steps"]]
    for method in sweep.methods:
        config = sweep.config(method, PROBE_STEPS)
        cost = sum(span_cost(span) * span.stage.steps for span in plan(config)) / config.steps
        steps = f"{known.methods[method].config.steps:,}" if method in known.methods else "as many as fit"
        rows.append([method, f"{config.optim.lr:g}", str(sweep.seeds), f"{sweep.seconds / 60:g}", str(len(config.stages)),
                     f"{cost:.2f} of a full one", steps])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    amounts = amount(sweep)
    at_a_time = f" {_load(sweep.jobs, sweep.base.threads)}:" if sweep.jobs > 1 else ""
    lines.append(
        f"{amounts['runs']} runs, {amounts['finished']} of them finished: {duration(amounts['seconds_left'])} of training,{at_a_time} "
        f"about {duration(ASIDE * amounts['seconds_left'] / sweep.jobs)} with evaluation and checkpoints"
    )
    return "\n".join(lines)


def amount(sweep: Sweep) -> dict[str, float]:
    """How many runs there are, how many are finished, and the seconds of training of the others."""
    runs = sweep.runs()
    done = sum(finished(run) for _, _, run in runs)
    return {"runs": len(runs), "finished": done, "seconds_left": (len(runs) - done) * sweep.seconds}


def finished(run: Path) -> bool:
    return any(event["event"] == "end" for event in read_metrics(run / METRICS))
