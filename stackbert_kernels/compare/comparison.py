"""Runs grouped by method, and what each method needs: cost until the baseline's final loss, loss at equal cost, seeds as mean and range.

A method is a configuration but for its seed; only seeds that all methods have finished count. Losses between evaluations are interpolated on the logarithm of what was spent. The
target is the baseline's final loss, the mean of its seeds; a method reaches it where the mean curve of its seeds first is that low, or
never. What earlier runs, teachers and source models cost is added to every measure unless they are free. Only finished runs are ranked: by seconds to
the target, then by loss at equal seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stackbert_kernels.compare.runs import (
    MEASURES,
    NOT_DECAYED,
    ROLES,
    Point,
    Run,
    Spent,
    read_runs,
    settings,
    source_settings,
)
from stackbert_kernels.config import MAY_CHANGE_ON_RESUME, ConfigError, TrainConfig
from stackbert_kernels.plan import warmup_steps

MID_DECAY = 0.9
"""A loss read where a method had spent less than this share of its own whole was read in mid-decay."""
PLATEAU_MARGIN = 0.1
"""Nats below the unigram loss from which a baseline has learned to use context."""
NOT_OF_THE_METHOD = ("seed", "data.text", "data.vocab", *MAY_CHANGE_ON_RESUME)
UNREMARKABLE = ("recipe", "steps", "eval_every", "optim.warmup", *ROLES, *NOT_OF_THE_METHOD)
DECIDES_EVALUATION = ("model.objective", "data.seq_len", "data.mask_rate", "data.whole_word", "data.eval_tokens")


@dataclass(frozen=True)
class Method:
    name: str
    runs: tuple[Run, ...]
    """Finished runs, by seed."""
    unfinished: tuple[Run, ...]


def compare(
    paths: Sequence[Path],
    *,
    baseline: str | None = None,
    free_source: bool = False,
    counting: str = "executed",
    clock: str = "passed",
    skip_begun: bool = False,
) -> dict:
    """The comparison of the runs at `paths` as plain JSON values; ConfigError says in one line why there is none.

    `baseline` is one of the runs or the name of a method; default: the recipe `baseline`, or else the method of the first run.
    `skip_begun` leaves out runs that have no evaluation yet, also where they are named themselves, and notes them.
    """
    runs, notes = read_runs(paths, counting, clock, skip_begun=skip_begun)
    notes += _comparable(runs)
    methods = _methods(runs)
    reference = _baseline(methods, runs, baseline)
    ranked = [method for method in methods if method.runs]
    if not reference.runs:
        run = reference.unfinished[0]
        raise ConfigError(
            f"compare: the baseline {reference.name} has no finished run: {run.directory} {run.unfinished}"
        )

    ranked = _with_the_same_seeds(ranked, notes)
    reference = next(method for method in ranked if method.name == reference.name)
    target = _mean_curve(reference.runs, free_source)[-1]["loss"]
    budgets = {
        measure: min(_total(run, measure, free_source) for method in ranked for run in method.runs)
        for measure in MEASURES
    }
    ends = {run.config.seed: run.curve[-1].loss for run in reference.runs}
    entries = [_entry(method, target, ends, budgets, free_source) for method in ranked]
    own = next(entry for entry in entries if entry["name"] == reference.name)
    for entry in entries:
        for measure in MEASURES:
            cost, base = entry["to_target"][measure], own["to_target"][measure]
            entry["to_target"][f"{measure}_saved"] = None if cost is None else 1 - cost / base
    entries.sort(key=_standing)
    unigram_loss, unigram_accuracy = reference.runs[0].unigram
    if target > unigram_loss - PLATEAU_MARGIN:
        notes.append(
            f"{reference.name} ended at {target:.3f}, not clearly below the loss without context ({unigram_loss:.3f}): "
            "differences between methods mean nothing there"
        )
    return {
        "target": {"loss": target, "method": reference.name, "runs": len(reference.runs)},
        "unigram": {"loss": unigram_loss, "accuracy": unigram_accuracy},
        "counting": counting,
        "clock": clock,
        "free_source": free_source,
        "equal": budgets,
        "load": _load(ranked),
        "methods": entries,
        "not_ranked": [
            {
                "name": f"{method.name}, seed {run.config.seed}",
                "run": str(run.directory),
                "why": run.unfinished,
                "curve": _mean_curve([run], free_source),
            }
            for method in methods
            for run in method.unfinished
        ],
        "notes": [*notes, *_method_notes(ranked, free_source)],
    }


# Methods


def _methods(runs: Sequence[Run]) -> list[Method]:
    groups: dict[object, list[Run]] = {}
    for run in runs:
        plain = settings(run.config) | {"stages": run.config.stages}
        for role in ROLES:
            if plain.get(role):
                plain[role] = _of_the_method(source_settings(plain[role], run.directory))
        key = tuple((name, repr(value)) for name, value in plain.items() if name not in NOT_OF_THE_METHOD)
        groups.setdefault(key, []).append(run)
    names = _names(list(groups.values()))
    return [
        Method(
            name,
            tuple(sorted((r for r in group if not r.unfinished), key=lambda r: r.config.seed)),
            tuple(r for r in group if r.unfinished),
        )
        for name, group in zip(names, groups.values(), strict=True)
    ]


def _of_the_method(value: object) -> object:
    return {k: v for k, v in value.items() if k not in NOT_OF_THE_METHOD} if isinstance(value, dict) else value


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The recipe; where several methods share it, with the settings in which they differ, or else with the first run's directory."""
    names = []
    for group in groups:
        config = group[0].config
        like = [settings(g[0].config) for g in groups if g[0].config.recipe == config.recipe]
        differ = [
            k for k in like[0] if k not in (*NOT_OF_THE_METHOD, "eval_every") and any(o[k] != like[0][k] for o in like)
        ]
        said = "".join(f" {k.rpartition('.')[2]}={_short(settings(config)[k])}" for k in differ)
        names.append(config.recipe + said)
    for parts in (1, 2, 99):  # of the path: as few as tell them apart
        twice = {name for name in names if names.count(name) > 1}
        where = ["/".join(group[0].directory.parts[-parts:]) for group in groups]
        told = [f"{name} ({place})" if name in twice else name for name, place in zip(names, where, strict=True)]
        if len(set(told)) == len(told):
            break
    return told


def _with_the_same_seeds(methods: Sequence[Method], notes: list[str]) -> list[Method]:
    """The methods with the runs of those seeds that all of them have: held-out samples and masks follow the seed, so one may be harder."""
    seeds = {method.name: {run.config.seed for run in method.runs} for method in methods}
    common = set.intersection(*seeds.values())
    if not common:
        _differing("seeds", {name: " ".join(map(str, sorted(own))) for name, own in seeds.items()}, notes)
        return list(methods)
    kept = []
    for method in methods:
        if extra := sorted(seeds[method.name] - common):
            notes.append(f"{method.name}: seed {', '.join(map(str, extra))} left out, not every method has finished it")
        kept.append(replace(method, runs=tuple(run for run in method.runs if run.config.seed in common)))
    return kept


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _baseline(methods: Sequence[Method], runs: Sequence[Run], asked: str | None) -> Method:
    if asked is None:
        of_recipe = [m for m in methods if m.name.split()[0] == "baseline"]
        if len(of_recipe) > 1:
            raise ConfigError(
                f"compare: several methods could be the baseline: {', '.join(m.name for m in of_recipe)}; name one by --baseline"
            )
        return of_recipe[0] if of_recipe else methods[0]
    for run in runs:
        if Path(asked).exists() and Path(asked).resolve() == run.directory.resolve():
            return next(m for m in methods if run in (*m.runs, *m.unfinished))
    fitting = [m for m in methods if m.name == asked] or [m for m in methods if m.name.split()[0] == asked]
    if len(fitting) != 1:
        raise ConfigError(
            f"compare: baseline must be one of the runs or one of the methods {', '.join(m.name for m in methods)}, got {asked!r}"
        )
    return fitting[0]


# Curves and what is read off them


def _before(run: Run, free_source: bool) -> Spent:
    known = [] if free_source else [source.spent for source in run.sources if source.spent]
    return sum(known, Spent())


def _total(run: Run, measure: str, free_source: bool) -> float:
    return getattr(run.curve[-1].spent + _before(run, free_source), measure)


def _mean_curve(runs: Sequence[Run], free_source: bool) -> list[dict]:
    """Points of the steps that every run evaluated at: mean spent and mean loss, with the range of the losses."""
    by_step: dict[int, list[tuple[Point, Spent]]] = {}
    for run in runs:
        before = _before(run, free_source)
        for point in run.curve:
            by_step.setdefault(point.step, []).append((point, point.spent + before))
    curve = []
    for step, found in sorted(by_step.items()):
        if len(found) == len(runs):
            losses = [point.loss for point, _ in found]
            spent = {m: _mean([getattr(s, m) for _, s in found]) for m in MEASURES}
            curve.append({"step": step, "stage": found[0][0].stage, **spent, "loss": _mean(losses), "low": min(losses), "high": max(losses)})  # fmt: skip
    return curve


def loss_at(curve: Sequence[dict], measure: str, spent: float) -> float | None:
    """The loss once `spent` was spent; None before the first evaluation and after the last."""
    if spent < curve[0][measure] or spent > curve[-1][measure]:
        return None
    for a, b in itertools.pairwise(curve):
        if spent <= b[measure]:
            return a["loss"] + _log_share(a[measure], b[measure], spent) * (b["loss"] - a["loss"])
    return curve[-1]["loss"]


def spent_to(curve: Sequence[dict], measure: str, loss: float) -> float | None:
    """What was spent when the loss first was `loss` or below; None: never."""
    if curve[0]["loss"] <= loss:
        return curve[0][measure]
    for a, b in itertools.pairwise(curve):
        if b["loss"] <= loss:
            share = (a["loss"] - loss) / (a["loss"] - b["loss"])
            return math.exp(math.log(a[measure]) + share * (math.log(b[measure]) - math.log(a[measure])))
    return None


def _log_share(low: float, high: float, x: float) -> float:
    return (math.log(x) - math.log(low)) / (math.log(high) - math.log(low)) if high > low else 1.0


def _entry(
    method: Method, target: float, baseline_ends: dict[int, float], budgets: dict[str, float], free_source: bool
) -> dict:
    """`baseline_ends`: the baseline's final loss of each seed, which a single run is held against: the seed decides how hard its held-out
    text is."""
    curve = _mean_curve(method.runs, free_source)
    curves = [_mean_curve([run], free_source) for run in method.runs]
    ends = [i for i, (a, b) in enumerate(itertools.pairwise(curve)) if a["stage"] != b["stage"]]
    own_targets = [baseline_ends.get(run.config.seed, target) for run in method.runs]
    differences = [
        run.curve[-1].loss - baseline_ends[run.config.seed] for run in method.runs if run.config.seed in baseline_ends
    ]
    to_target: dict[str, object] = {
        "reached": spent_to(curve, "flops", target) is not None,
        "runs_that_reached": sum(
            spent_to(c, "flops", own) is not None for c, own in zip(curves, own_targets, strict=True)
        ),
    }
    for measure in MEASURES:
        to_target[measure] = spent_to(curve, measure, target)
        each = [spent_to(c, measure, own) for c, own in zip(curves, own_targets, strict=True)]
        reached = [x for x in each if x is not None]
        to_target[f"{measure}_range"] = [min(reached), max(reached)] if reached else None
    at = {}
    for measure, budget in budgets.items():
        losses = [loss_at(c, measure, budget) for c in curves]
        whole = _mean([c[-1][measure] for c in curves])
        at[measure] = None if None in losses else _spread(losses) | {"mid_decay": budget < MID_DECAY * whole}
    config = method.runs[0].config
    return {
        "name": method.name,
        "recipe": config.recipe,
        "runs": [str(run.directory) for run in method.runs],
        "seeds": [run.config.seed for run in method.runs],
        "steps": config.steps,
        "lr": config.optim.lr,
        "tuning": method.runs[0].tuning,
        "final_loss": _spread([run.curve[-1].loss for run in method.runs]),
        "final_against_baseline": _spread(differences) if differences else None,
        "final_accuracy": _spread([run.curve[-1].accuracy for run in method.runs]),
        "spent": {m: _spread([_total(run, m, free_source) for run in method.runs]) for m in MEASURES},
        "before": asdict(_before(method.runs[0], free_source)),
        "sources": [asdict(source) for run in method.runs for source in run.sources],
        "at_equal": at,
        "to_target": to_target,
        "curve": curve,
        "stage_ends": ends,
    }


def _standing(entry: dict) -> tuple:
    at = entry["at_equal"]["seconds"]
    loss = entry["final_loss"]["mean"] if at is None else at["mean"]
    seconds = entry["to_target"]["seconds"]
    return (seconds is None, seconds if seconds is not None else loss, loss)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": _mean(values), "min": min(values), "max": max(values)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# What a reader must know


def _comparable(runs: Sequence[Run]) -> list[str]:
    """ConfigError where losses of two runs mean different things; notes where they mean the same but something else differs."""
    first = runs[0]
    for run in runs[1:]:
        for part in ("tokenizer", "held-out text"):
            if run.fingerprint and first.fingerprint and run.fingerprint[part] != first.fingerprint[part]:
                raise ConfigError(
                    f"compare: {run.directory} has another {part} than {first.directory}: their losses cannot be compared"
                )
        if run.unigram[0] and first.unigram[0] and not math.isclose(run.unigram[0], first.unigram[0], rel_tol=1e-9):
            raise ConfigError(
                f"compare: {run.directory} has another text or tokenizer than {first.directory} (losses without context {run.unigram[0]:.4f} "
                f"and {first.unigram[0]:.4f}): their losses cannot be compared"
            )
        differing = evaluated_otherwise(run.config, first.config)
        if differing:
            raise ConfigError(
                f"compare: {run.directory} was evaluated in another way than {first.directory}: {', '.join(differing)}: "
                "their losses cannot be compared"
            )
    notes = []
    if any(run.fingerprint is None for run in runs):
        gone = [run.directory.name for run in runs if run.fingerprint is None]
        notes.append(
            f"the prepared text of {', '.join(gone)} is not there any more: only the losses without context say that it was the same"
        )
    texts = {run.fingerprint["training text"] for run in runs if run.fingerprint}
    if len(texts) > 1:
        notes.append("the runs were trained on different texts (the tokenizer and the held-out text are the same)")
    return notes


def evaluated_otherwise(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """The settings in which two runs' evaluations differ: "mask_rate 0.3 and 0.15", so that their losses mean different things."""
    a, b = settings(ours), settings(theirs)
    return [
        f"{name.rpartition('.')[2]} {a[name]} and {b[name]}"
        for name in DECIDES_EVALUATION
        if name in a and a[name] != b[name]
    ]


def _method_notes(methods: Sequence[Method], free_source: bool) -> list[str]:
    notes = []
    flat = {m.name: settings(m.runs[0].config) for m in methods}
    shares = {m.name: round(warmup_steps(c := m.runs[0].config) / c.steps, 2) for m in methods}
    for setting in next(iter(flat.values()), {}):
        if setting not in UNREMARKABLE:
            _differing(setting, {name: values[setting] for name, values in flat.items()}, notes)
    _differing("share of steps to warm up", shares, notes)
    at_a_time = {m.name: " and ".join(sorted({str(r.load.jobs if r.load else 1) for r in m.runs})) for m in methods}
    _differing("number of runs at a time, so that seconds mean different things", at_a_time, notes)
    if min((len(m.runs) for m in methods), default=0) == 1:
        notes.append("a method with one run says nothing about chance: take three seeds")
    for method in methods:
        if any((run.last_rate or 0.0) > NOT_DECAYED for run in method.runs):
            notes.append(
                f"{method.name}: its rate had not decayed when it ended ({100 * max(r.last_rate or 0 for r in method.runs):.0f}% of the highest)"
            )
        notes += _tuning_notes(method)
        sources = list({s.path: s for run in method.runs for s in run.sources}.values())
        if len(sources) > 1 and len(sources) == len(method.runs) and all(s.spent for s in sources):
            mean = Spent(*(_mean([getattr(s.spent, m) for s in sources]) for m in MEASURES))
            notes.append(f"{method.name}: the {sources[0].role} of each run {_accounted(mean, free_source)}")
            continue
        notes += [f"{method.name}: {s.role} {s.path} {_accounted(s.spent, free_source)}" for s in sources]
    return notes


def _differing(what: str, values: dict[str, object], notes: list[str]) -> None:
    if len({repr(value) for value in values.values()}) > 1:
        by_value: dict[str, list[str]] = {}
        for name, value in values.items():
            by_value.setdefault(_short(value), []).append(name)
        most = max(by_value.values(), key=len)
        if len(most) > len(values) / 2 and len(most) > 2:  # said last, and shortly
            by_value = {v: names for v, names in by_value.items() if names is not most} | {
                next(v for v, names in by_value.items() if names is most): ["the others"]
            }
        said = ", ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())
        notes.append(f"different {what.rpartition('.')[2]}: {said}")


def _load(methods: Sequence[Method]) -> dict[str, int | None] | None:
    """Under which load all runs were made; None where it is not known or not the same."""
    loads = {run.load for method in methods for run in method.runs}
    (only,) = loads if len(loads) == 1 else (None,)
    return asdict(only) if only else None


def _tuning_notes(method: Method) -> list[str]:
    """Rates at which it diverged, and a best one at the edge of those tried: another might have been better."""
    tuning = method.runs[0].tuning
    if not tuning:
        return []
    lr, notes = method.runs[0].config.optim.lr, []
    if diverged := [_short(trial["lr"]) for trial in tuning["tried"] if trial["loss"] is None]:
        notes.append(f"{method.name}: diverged at rate {', '.join(diverged)} when it was tuned")
    known = [(trial["loss"], trial.get("unigram")) for trial in tuning["tried"] if trial["loss"] is not None]
    if known and all(unigram is not None and loss >= unigram for loss, unigram in known):
        notes.append(
            f"{method.name}: no trial of a rate got below the loss without context, so its rate {_short(lr)} says little"
        )
        return notes
    for edge, word in ((min, "lowest"), (max, "highest")):
        if len(tuning["rates"]) > 1 and lr == edge(tuning["rates"]):
            notes.append(f"{method.name}: its rate {_short(lr)} is the {word} of those tried")
    return notes


def _accounted(spent: Spent | None, free_source: bool) -> str:
    if free_source:
        return "is taken as free"
    if spent is None:
        return "has no record of its cost, which is left out"
    return f"is counted: {spent.flops:.3g} FLOPs, {spent.seconds:.3g} s"
