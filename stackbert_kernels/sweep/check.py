"""What can be wrong with a sweep, found before any work, and its plan for a person. Loads no torch."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from stackbert_kernels.compare.comparison import evaluated_otherwise
from stackbert_kernels.compare.runs import SWEEP
from stackbert_kernels.config import ConfigError, TrainConfig, differences
from stackbert_kernels.plan import plan, span_cost
from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.sweep.performing import ASIDE
from stackbert_kernels.sweep.record import Record, Timed, read
from stackbert_kernels.sweep.settings import NEEDS, Sweep
from stackbert_kernels.sweep.side_by_side import cores
from stackbert_kernels.sweep.tuning import with_rates
from stackbert_kernels.sweep.work import finished
from stackbert_kernels.train.budget import PROBE_STEPS
from stackbert_kernels.train.run_directory import DATA, check
from stackbert_kernels.train.run_facts import duration

MOST_SEEDS = 1000


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
    if sweep.seeds > MOST_SEEDS:
        raise ConfigError(f"sweep: seeds must be at most {MOST_SEEDS}, got {sweep.seeds}")
    if not 0 < sweep.seconds < float("inf"):
        raise ConfigError(f"sweep: minutes must be > 0, got {sweep.seconds / 60:g}")
    if not 0 < sweep.warmup < 1:
        raise ConfigError(f"sweep: warmup_share must be in (0, 1), got {sweep.warmup:g}")
    if sweep.tune and not 0 < sweep.tune_seconds <= sweep.seconds:
        raise ConfigError(
            f"sweep: tune_minutes must be in (0, minutes {sweep.seconds / 60:g}], got {sweep.tune_seconds / 60:g}"
        )
    if len(set(sweep.tune)) < len(sweep.tune) or any(not 0 < rate < float("inf") for rate in sweep.tune):
        raise ConfigError(f"sweep: tune must be rates > 0, each once, got {' '.join(f'{r:g}' for r in sweep.tune)}")
    if not 0 < sweep.source_share < 1:
        raise ConfigError(f"sweep: source_share must be in (0, 1), got {sweep.source_share:g}")
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
    sweep = replace(sweep, base=_checked_base(sweep))
    known = (not fresh and read(out)) or Record()
    same_load(sweep, known, sweep.base.threads)
    _same_trials(sweep, known)
    for method in sweep.methods:
        if method in known.methods:
            _same(with_rates(sweep, known), method, known.methods[method])
    return sweep


def _checked_base(sweep: Sweep) -> TrainConfig:
    """What the methods share, with absolute paths and what is known of the words; ConfigError where a method cannot be run with it."""
    base, needing = sweep.base, [method for methods in NEEDS.values() for method in methods]
    for setting, methods in NEEDS.items():
        if getattr(base, setting) and not any(method in methods for method in sweep.methods):
            raise ConfigError(
                f"sweep: --{setting} is for {', '.join(methods)}, but the recipes are {', '.join(sweep.methods)}"
            )
    # A source brings its words, by which all methods then read the text: those that have one come first.
    for method in sorted(sweep.methods, key=lambda method: method not in needing):
        now = replace(sweep, base=base)
        setting = now.makes(method)
        if setting:
            _can_be_made(base, method, setting)
        config = now.source_config(method, PROBE_STEPS) if setting else now.config(method, PROBE_STEPS)
        found = check(config, sweep.directory / ".nothing")
        base = replace(
            base,
            model=replace(base.model, vocab_size=found.model.vocab_size),
            data=replace(base.data, text=found.data.text, vocab=found.data.vocab),
            **{s: getattr(found, s) or getattr(base, s) for s in NEEDS},
            teacher_shape=found.teacher_shape if found.teacher else base.teacher_shape,
        )
    return base


def _can_be_made(base: TrainConfig, method: str, setting: str) -> None:
    """Whether a run of ours can be the source or teacher: it is read as a BERT of transformers."""
    if find_spec("transformers") is None:
        raise ConfigError(f"sweep: the {setting} of {method} is read by transformers: pip install transformers")
    if base.model.norm != "post" or base.model.embedding:
        raise ConfigError(
            f"sweep: the {setting} of {method} is a BERT: norm must be 'post' and embedding 0, "
            f"got {base.model.norm!r} and {base.model.embedding}; or leave {method} out"
        )


def _same_trials(sweep: Sweep, known: Record) -> None:
    """ConfigError where the rates of a method were sought in another way."""
    tuned = {method for method, _, _ in sweep.trials()}
    for method in sweep.methods:
        there = known.tuning.get(method)
        if method in tuned:
            if (
                there is None
                and method in known.methods
                and any((sweep.directory / f"{method}-seed{sweep.base.seed + i}").exists() for i in range(sweep.seeds))
            ):
                raise ConfigError(
                    f"{sweep.directory} holds runs of {method} whose rate was not tuned; take another --out, or --fresh"
                )
            wanted = (set(sweep.tune), sweep.tune_seconds, sweep.base.seed)
            if there and (set(there.rates), there.seconds, there.seed) != wanted:
                raise ConfigError(
                    f"{sweep.directory} tuned {method} with {_trials(there.rates, there.seconds)} and seed {there.seed}, "
                    f"wanted {_trials(sweep.tune, sweep.tune_seconds)} and seed {sweep.base.seed}; take another --out, or --fresh"
                )


def _trials(rates: tuple[float, ...], seconds: float) -> str:
    return f"--tune {' '.join(f'{rate:g}' for rate in rates)} of {seconds / 60:g} minutes"


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
    differing = []
    pairs = [(entry.config, sweep.config(method, entry.config.steps))]
    if bool(entry.source) != bool(sweep.makes(method)):
        differing.append(
            f"its source or teacher: {'made' if entry.source else 'given'} -> {'given' if entry.source else 'made'}"
        )
    elif entry.source:
        pairs.append((entry.source, sweep.source_config(method, entry.source.steps)))
    for there, wanted in pairs:
        wanted = replace(
            wanted,
            model=replace(wanted.model, vocab_size=wanted.model.vocab_size or there.model.vocab_size),
            data=replace(wanted.data, text=there.data.text),  # what is read decides, not where: run.py looks
        )
        if method not in sweep.rates and sweep.tune:  # its rate is not known yet
            wanted = replace(wanted, optim=replace(wanted.optim, lr=there.optim.lr))
        differing += [line for line in differences(there, wanted) if line not in differing]
    if entry.seconds != sweep.seconds:
        differing.append(f"minutes: {entry.seconds / 60:g} -> {sweep.seconds / 60:g}")
    if differing:
        raise ConfigError(f"{sweep.directory} holds {method} with other settings: {'; '.join(differing)} (there -> wanted); take another --out, or --fresh")  # fmt: skip


def outline(sweep: Sweep) -> str:
    """The plan for a person, before anything was timed."""
    known = read(sweep.directory) or Record()
    rows = [["recipe", "rate", "runs", "minutes each", "stages", "a step costs", "steps"]]
    trials = {method for method, _, _ in sweep.trials()}
    rated = with_rates(sweep, known)
    for method in sweep.methods:
        config = rated.config(method, PROBE_STEPS)
        if method not in trials:
            rate = f"{config.optim.lr:g}"
        else:
            rate = f"{config.optim.lr:g} (tuned)" if method in rated.rates else "tuned"
        cost = sum(span_cost(span) * span.stage.steps for span in plan(config)) / config.steps
        steps = f"{known.methods[method].config.steps:,}" if method in known.methods else "as many as fit"
        rows.append([method, rate, str(sweep.seeds), f"{sweep.seconds / 60:g}", str(len(config.stages)),
                     f"{cost:.2f} of a full one", steps])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for method in sweep.methods:
        if setting := sweep.makes(method):
            model = sweep.source_config(method, PROBE_STEPS).model
            lines.append(
                f"{method}: each run first trains its {setting}, {model.layers} layers of hidden size {model.hidden}, for "
                f"{sweep.source_share:.0%} of its time"
            )
    amounts = amount(sweep)
    if amounts["trials"]:
        lines.append(
            f"tuning: {amounts['trials']} runs of {sweep.tune_seconds / 60:g} minutes, {amounts['tried']} of them made, at rates "
            f"{' '.join(f'{rate:g}' for rate in sweep.tune)}: {duration(amounts['tuning_seconds_left'])} more, which no method is charged with"
        )
    at_a_time = f" {_load(sweep.jobs, sweep.base.threads)}:" if sweep.jobs > 1 else ""
    lines.append(
        f"{amounts['runs']} run{'s' * (amounts['runs'] > 1)}, {amounts['finished']} of them finished: {duration(amounts['seconds_left'])} of training,{at_a_time} "
        f"about {duration(ASIDE * (amounts['seconds_left'] + amounts['tuning_seconds_left']) / sweep.jobs)} with evaluation"
        + (", checkpoints and tuning" if amounts["tuning_seconds_left"] else " and checkpoints")
    )
    return "\n".join(lines)


def amount(sweep: Sweep) -> dict[str, float]:
    """How many runs there are, how many are finished, and the seconds of training of the others; of the trials of rates likewise."""
    runs, known = sweep.runs(), read(sweep.directory) or Record()
    done = sum(finished(run) for _, _, run in runs)
    trials = sweep.trials()
    tried = sum(any(t.lr == rate for t in known.tuning[m].tried) for m, rate, _ in trials if m in known.tuning)
    return {
        "runs": len(runs),
        "finished": done,
        "seconds_left": (len(runs) - done) * sweep.seconds,
        "trials": len(trials),
        "tried": tried,
        "tuning_seconds_left": (len(trials) - tried) * sweep.tune_seconds,
    }
