"""Every method on the same text, batches, budget of seconds and evaluation, each seed a run; then their comparison.

    DIR/data/              token shards, once for all, unless the text was given as a prepared directory
    DIR/sweep.json         of each method: how long its steps took, and the configuration of its runs that follows from it
    DIR/METHOD-seedN/      run directories
    DIR/compare.json  compare.png

Same seed, same batches in the same order and the same evaluation, whatever the method. Each method is timed for a few steps of every stage
first; from that follows how many steps fit into the budget, over which the method lays its own stages and everyone the same shape of warm-up
and decay. Runs go seed by seed, so that what was finished at any moment is a fair comparison and a slow hour of the machine meets all
methods alike. The same command goes on where a sweep stopped; more methods and more seeds can be added to it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackbert_kernels.compare.comparison import compare, evaluated_otherwise
from stackbert_kernels.compare.output import write
from stackbert_kernels.config import ConfigError, TrainConfig, differences, from_dict, to_dict
from stackbert_kernels.data.prepare import is_prepared, load_manifest, prepare
from stackbert_kernels.plan import plan, span_cost
from stackbert_kernels.recipes import NEED_SOURCE, RECIPES
from stackbert_kernels.train.budget import PROBE_STEPS, TIMED_STEPS, enough, steps_that_fit, timing_of
from stackbert_kernels.train.run_directory import DATA, METRICS, check, read_metrics, write_json
from stackbert_kernels.train.run_facts import duration

SWEEP, TIMING = "sweep.json", ".timing"
EVALUATIONS, CHECKPOINTS, LOGGED = 20, 10, 100
"""So many of each in a run."""
TIMING_SHARE, LONGEST_TIMING = 0.05, 200
"""Of the budget, and steps a stage: a timing of few short steps is repeated with more, so that a busy moment of the machine decides nothing."""
ASIDE = 1.1
"""Evaluation, checkpoints and preparation take a tenth of the training or so."""


@dataclass(frozen=True)
class Sweep:
    """What is run; `base` says all that the methods share."""

    base: TrainConfig
    methods: tuple[str, ...]
    directory: Path
    seconds: float
    seeds: int = 3
    warmup: float = 0.05
    """Share of a run's steps over which the rate rises."""
    rates: dict[str, float] = field(default_factory=dict)
    """Highest learning rate of methods that have their own."""
    options: dict[str, object] = field(default_factory=dict)
    """Options of recipes that differ from their defaults."""

    def config(self, method: str, steps: int) -> TrainConfig:
        """The run of a method with the first seed."""
        base = self.base
        optim = replace(base.optim, lr=self.rates.get(method, base.optim.lr), warmup=max(1, round(self.warmup * steps)))
        function, options = RECIPES[method]
        return function(
            replace(
                base,
                steps=steps,
                stages=(),
                source=base.source if method in NEED_SOURCE else "",
                optim=optim,
                keep=1,
                eval_every=max(1, steps // EVALUATIONS),
                checkpoint_every=max(1, steps // CHECKPOINTS),
                log_every=max(1, steps // LOGGED),
            ),
            self.options.get(method, options()),
        )

    def recipe(self, method: str) -> Callable[[int], TrainConfig]:
        return lambda steps: self.config(method, steps)

    def runs(self) -> list[tuple[str, int, Path]]:
        """Method, seed and directory, in the order of the work."""
        first = self.base.seed
        return [
            (m, seed, self.directory / f"{m}-seed{seed}")
            for seed in range(first, first + self.seeds)
            for m in self.methods
        ]


def checked(sweep: Sweep, *, fresh: bool = False) -> Sweep:
    """Looks at everything that can be wrong before work begins and changes nothing; ConfigError in one line.

    An earlier sweep of other settings is refused unless `fresh`. Returns the sweep with absolute paths in `base`.
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
    known = {} if fresh else _known(out)
    for method in sweep.methods:
        if method in known:
            _same(sweep, method, known[method])
    return sweep


def _known(directory: Path) -> dict[str, dict]:
    """What sweep.json says of each method; nothing where there is none."""
    try:
        found = json.loads((directory / SWEEP).read_text(encoding="utf-8"))
        return {name: entry | {"config": from_dict(entry["config"])} for name, entry in found["methods"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory / SWEEP} cannot be read: {error}") from None


def _same(sweep: Sweep, method: str, entry: dict) -> None:
    """ConfigError unless the sweep that began here would have made the same runs of `method`."""
    there: TrainConfig = entry["config"]
    wanted = sweep.config(method, there.steps)
    wanted = replace(
        wanted,
        model=replace(wanted.model, vocab_size=wanted.model.vocab_size or there.model.vocab_size),
        data=replace(wanted.data, text=(str(_shards(sweep).resolve()),)),
    )
    differing = differences(there, wanted)
    if entry["seconds"] != sweep.seconds:
        differing.append(f"minutes: {entry['seconds'] / 60:g} -> {sweep.seconds / 60:g}")
    if differing:
        raise ConfigError(f"{sweep.directory} holds {method} with other settings: {'; '.join(differing)} (there -> wanted); take another --out, or --fresh")  # fmt: skip


def _shards(sweep: Sweep) -> Path:
    """Where the tokens are: `prepare` puts them there, and refuses the directory if they are of another text."""
    text = sweep.base.data.text
    return Path(text[0]) if len(text) == 1 and is_prepared(text[0]) else sweep.directory / DATA


def remove(sweep: Sweep) -> None:
    """What an earlier sweep wrote, and nothing else."""
    for method in _known(sweep.directory):
        for run in sweep.directory.glob(f"{method}-seed*"):
            if run.name.removeprefix(f"{method}-seed").isdigit():
                shutil.rmtree(run)
    shutil.rmtree(sweep.directory / DATA, ignore_errors=True)
    for name in (SWEEP, "compare.json", "compare.png"):
        (sweep.directory / name).unlink(missing_ok=True)


def outline(sweep: Sweep) -> str:
    """The plan for a person, before anything was timed."""
    known = _known(sweep.directory)
    rows = [["recipe", "rate", "runs", "minutes each", "stages", "a step costs", "steps"]]
    for method in sweep.methods:
        config = sweep.config(method, PROBE_STEPS)
        cost = sum(span_cost(span) * span.stage.steps for span in plan(config)) / config.steps
        steps = f"{known[method]['config'].steps:,}" if method in known else "as many as fit"
        rows.append([method, f"{config.optim.lr:g}", str(sweep.seeds), f"{sweep.seconds / 60:g}", str(len(config.stages)),
                     f"{cost:.2f} of a full one", steps])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    amounts = amount(sweep)
    lines.append(
        f"{amounts['runs']} runs, {amounts['finished']} of them finished: {duration(amounts['seconds_left'])} of training, "
        f"about {duration(ASIDE * amounts['seconds_left'])} with evaluation and checkpoints"
    )
    return "\n".join(lines)


def amount(sweep: Sweep) -> dict[str, float]:
    """How many runs there are, how many are finished, and the seconds of training of the others."""
    runs = sweep.runs()
    done = sum(finished(run) for _, _, run in runs)
    return {"runs": len(runs), "finished": done, "seconds_left": (len(runs) - done) * sweep.seconds}


def finished(run: Path) -> bool:
    return any(event["event"] == "end" for event in read_metrics(run / METRICS))


def run_sweep(sweep: Sweep, *, say: Callable[[str], None]) -> dict:
    """Times, trains and compares. Returns status "finished", "failed" (of the runs in `failed`) or "stopped", and the comparison so far."""
    from stackbert_kernels.train.loop import train

    out = sweep.directory
    out.mkdir(parents=True, exist_ok=True)
    if not (out / SWEEP).exists():
        write_json(out / SWEEP, {"methods": {}})
    data = prepare(sweep.base.data.text, out / DATA, sweep.base.data, progress=sys.stderr.isatty())
    model = replace(sweep.base.model, vocab_size=load_manifest(data)["vocab_size"])
    sweep = replace(
        sweep, base=replace(sweep.base, model=model, data=replace(sweep.base.data, text=(str(data.resolve()),)))
    )

    runs, failed = sweep.runs(), []
    for number, (method, seed, run) in enumerate(runs, 1):
        place = f"[{number}/{len(runs)}] {method} seed {seed}"
        if finished(run):
            say(f"{place}: finished before, {_score(run)}")
            continue
        known = _known(out)
        if method not in known:
            say(f"{place}: timing its stages")
            entry = _timed(sweep, method, train)
            if entry is None:
                return _result(sweep, "stopped", failed)
            write_json(
                out / SWEEP,
                {"methods": {n: e | {"config": to_dict(e["config"])} for n, e in (known | {method: entry}).items()}},
            )
            known = known | {method: entry}
        config = replace(known[method]["config"], seed=seed)
        left = (len(runs) - number) * sweep.seconds
        say(f"{place}: {config.steps:,} steps in about {duration(sweep.seconds)}; then {duration(left)} to go")
        result = train(config, run, progress=sys.stderr.isatty())
        if result["status"] == "stopped":
            say(f"{place}: {result['message']}")
            return _result(sweep, "stopped", failed)
        if result["status"] == "failed":
            failed.append(str(run))
            say(f"{place}: {result['message']}")
        else:
            say(f"{place}: {_score(run)}")
    return _result(sweep, "failed" if failed else "finished", failed)


def _timed(sweep: Sweep, method: str, train: Callable) -> dict | None:
    """Seconds a step of each stage, and the configuration whose steps fill the budget; None where a signal came between."""
    recipe, place = sweep.recipe(method), sweep.directory / TIMING

    def result_of(timed: int) -> dict:
        shutil.rmtree(place, ignore_errors=True)
        try:
            return train(timing_of(recipe, timed), place, progress=False)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    result = result_of(TIMED_STEPS)
    if result["status"] == "finished":
        longer = min(LONGEST_TIMING, int(TIMING_SHARE * sweep.seconds / sum(result["stage_seconds"])))
        if longer > 2 * TIMED_STEPS:
            result = result_of(longer)
    if result["status"] == "stopped":
        return None
    if result["status"] == "failed":
        raise ConfigError(
            f"sweep: {method} does not get through its first steps: {result['message'].partition(';')[0]}"
        )
    each = result["stage_seconds"]
    try:
        steps = enough(steps_that_fit(recipe, each, sweep.seconds), sweep.seconds)
        config = recipe(steps)
    except ConfigError as error:
        raise ConfigError(f"sweep: {method} in {sweep.seconds / 60:g} minutes: {error}") from None
    return {"seconds": sweep.seconds, "seconds_per_step": each, "config": config}


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
        write(result["comparison"], sweep.directory)
    return result
