"""A run as the comparison sees it: held-out losses over what had been spent by then, and what the models that it uses had cost before.

Everything comes from the run's directory: config.json, metrics.jsonl, and the manifest of its token shards. A model that a run began
from or learned from (a source, a teacher, an earlier run) is found in either of two places:

    metrics.jsonl   {"event": "source", "role": "source" or "teacher", "path": ..., "flops": ..., "tokens": ..., "seconds": ...}
    config.json     a key `source` or `teacher`, at any depth, whose value is a path

Its cost is what the run at that path spent (RUN/model belongs to RUN), its own sources included; where no run is there, the figures
of the event; where there are none, it is unknown. Stages of the run itself are no source: `flops` and `seconds` of its log count from its
first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from stackbert_kernels.config import ConfigError, TrainConfig, from_dict, to_dict
from stackbert_kernels.plan import head_cost, layer_flops, plan, span_cost, step_cost
from stackbert_kernels.train.run_directory import CONFIG, DATA, METRICS, read_metrics
from stackbert_kernels.train.run_facts import Facts, number, read_facts

MEASURES = ("flops", "tokens", "seconds")
SWEEP, SOURCES = "sweep.json", "sources"
"""Beside the runs of a sweep: how many there were at a time, and with how many threads each; how each recipe's rate was found. And the runs
of the models that they needed."""
COUNTINGS = {"executed": None, "b1": 1.0, "b2": 2.0}
"""How FLOPs are counted: the matrix products as executed (the log's), or layer forwards by plan.step_cost with this b, the head included."""
CLOCKS = ("passed", "timed")
"""What seconds are: those that passed in the run (the log's), or its steps at what a step of their stage took when the sweep timed it, which
says more where runs were made on a machine that others used."""
ROLES = ("source", "teacher")
NOT_DECAYED = 0.25
"""A finished run whose rate still is above this share of its highest has not decayed."""


@dataclass(frozen=True)
class Spent:
    flops: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Point:
    """An evaluation."""

    step: int
    stage: int
    spent: Spent
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Source:
    """A model that was there before the run; `spent` is None where nothing says what it cost."""

    role: str
    path: str
    spent: Spent | None


@dataclass(frozen=True)
class Load:
    """What else the machine did, without which seconds say nothing: runs at a time, and CPU threads of each (None: not noted)."""

    jobs: int
    threads: int | None


@dataclass(frozen=True)
class Run:
    directory: Path
    config: TrainConfig
    curve: tuple[Point, ...]
    unfinished: str | None
    """Why its last loss is not that of a finished run; None where it is."""
    last_rate: float | None
    """The last learning rate over the highest."""
    unigram: tuple[float, float]
    """Loss and accuracy without context."""
    fingerprint: dict[str, str] | None
    """SHA-256 of the tokenizer and of the shards, by split; None where the shards are not there any more."""
    sources: tuple[Source, ...]
    load: Load | None
    """None of a run that no sweep made."""
    tuning: dict | None
    """The trials of rates that found this run's, as its sweep noted them; None where there were none."""


class NoEvaluation(ConfigError):
    """A run that has no evaluation with a finite loss."""


def read_runs(
    paths: Sequence[Path], counting: str = "executed", clock: str = "passed", *, skip_begun: bool = False
) -> tuple[list[Run], list[str]]:
    """The runs at `paths`, each a run directory or a folder of them, and notes on those left out because they have no evaluation yet.

    ConfigError for anything else at `paths`, for a run without evaluation that is named itself, unless `skip_begun`, and where no run is
    left.
    """
    runs, notes = [], []
    for directory, in_folder in _directories(paths):
        try:
            runs.append(read_run(directory, counting, clock))
        except NoEvaluation as error:
            if not (in_folder or skip_begun):
                raise
            notes.append(f"{str(error).removeprefix('compare: ')}: left out")
    if not runs:
        raise ConfigError(f"compare: no run has an evaluation with a finite loss yet ({len(notes)} begun)")
    return runs, notes


def _directories(paths: Sequence[Path]) -> list[tuple[Path, bool]]:
    """Run directories, and whether each was found in a folder."""
    found: list[tuple[Path, bool]] = []
    for path in map(Path, paths):
        inside = [] if _is_run(path) else sorted(filter(_is_run, path.iterdir() if path.is_dir() else ()))
        if not inside and not _is_run(path):
            raise ConfigError(f"compare: {path} must be a run directory ({CONFIG} and {METRICS}) or a folder of them")
        found += [(directory, True) for directory in inside] or [(path, False)]
    directories = [directory for directory, _ in found]
    twice = next((p for i, p in enumerate(directories) if p.resolve() in {q.resolve() for q in directories[:i]}), None)
    if twice is not None:
        raise ConfigError(f"compare: {twice} is named twice")
    return found


def read_run(directory: Path, counting: str = "executed", clock: str = "passed") -> Run:
    """NoEvaluation where the run has no finite one, ConfigError where the directory holds no run, or one that was not timed and has to be."""
    facts, config = _facts(directory)
    each = _timed(directory, config) if clock == "timed" else None
    if clock == "timed" and each is None:
        raise ConfigError(f"compare: {directory} is no run of a sweep that timed its steps: take --clock passed")
    curve = _curve(facts, config, counting, each)
    if not curve:
        raise NoEvaluation(f"compare: {directory} has no evaluation with a finite loss yet")
    rates = [rate for e in facts.steps if (rate := number(e, "lr")) is not None]
    scored = facts.evals[-1]
    return Run(
        directory=directory,
        config=config,
        curve=curve,
        unfinished=_unfinished(facts, config, curve),
        last_rate=rates[-1] / max(rates) if rates and max(rates) > 0 else None,
        unigram=(number(scored, "unigram_loss") or 0.0, number(scored, "unigram_accuracy") or 0.0),
        fingerprint=_fingerprint(directory, config),
        sources=tuple(_sources(directory, facts, counting, clock, {directory.resolve()})),
        load=_load(directory),
        tuning=_tuning(directory, config),
    )


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / METRICS).is_file()


def _facts(directory: Path) -> tuple[Facts, TrainConfig]:
    try:
        facts = read_facts(directory)
        return facts, from_dict(facts.config)
    except ValueError as error:
        raise ConfigError(f"compare: {directory} holds no run that can be read: {error}") from None


def _of_the_sweep(directory: Path) -> dict:
    """What the sweep beside whose record the run lies noted."""
    try:
        recorded = json.loads((directory.resolve().parent / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _load(directory: Path) -> Load | None:
    recorded = _of_the_sweep(directory)
    return Load(recorded.get("jobs", 1), recorded.get("threads")) if recorded else None


def _tuning(directory: Path, config: TrainConfig) -> dict | None:
    found = _of_the_sweep(directory).get("tuning", {}).get(config.recipe)
    return found if found and found["lr"] == config.optim.lr else None


def _timed(directory: Path, config: TrainConfig) -> tuple[float, ...] | None:
    """Seconds that a step of each stage took when the sweep timed it, for a run of its methods or of the models that they need."""
    place, key, method = directory.resolve(), "seconds_per_step", config.recipe
    if place.parent.name == SOURCES:
        place, key, method = place.parent, f"source_{key}", place.name.rpartition("-")[0]
    each = _of_the_sweep(place).get("methods", {}).get(method, {}).get(key)
    return tuple(each) if each and len(each) == len(config.stages) else None


def source_settings(path: str, directory: Path) -> object:
    """What a source or teacher of the run in `directory` is, whichever seed it was trained with: its settings, or the path where no run is
    there."""
    run = _source_run(Path(path), directory)
    return path if run is None else settings(_facts(run)[1])


def _source_run(path: Path, directory: Path) -> Path | None:
    """The run of a source: RUN, or RUN of RUN/model; where a sweep was moved, the one that lies beside its runs."""
    beside = directory.resolve().parent / SOURCES / path.name
    return next((p for p in (path, path.parent, beside) if _is_run(p)), None)


def _curve(
    facts: Facts, config: TrainConfig, counting: str, each: tuple[float, ...] | None = None
) -> tuple[Point, ...]:
    """Evaluations with a finite loss. Each stage ends with an evaluation, so what is spent between two is of one stage.

    `each`: seconds of a step of each stage, in place of those that passed.
    """
    points, flops, tokens, seconds, done = [], 0.0, 0.0, 0.0, 0
    for event in facts.evals:
        here = {name: number(event, name) for name in (*MEASURES, "stage")}
        if None in here.values() or not 0 <= here["stage"] < len(config.stages):
            continue
        stage = int(here["stage"])
        if COUNTINGS[counting] is None:
            flops = here["flops"]
        else:
            since = range(done, int(event["step"]))
            flops += (here["tokens"] - tokens) * _layer_model(config, stage, since, COUNTINGS[counting])
        seconds = here["seconds"] if each is None else seconds + (int(event["step"]) - done) * each[stage]
        tokens, done = here["tokens"], int(event["step"])
        loss = number(event, "eval_loss")
        if loss is not None:
            spent = Spent(flops, tokens, seconds)
            points.append(Point(int(event["step"]), stage, spent, loss, number(event, "eval_accuracy") or 0.0))
    return tuple(points)


def _layer_model(config: TrainConfig, stage: int, steps: range, backward: float) -> float:
    """FLOPs that `steps` of a stage spend on a token, in the mean, if a layer's backward costs `backward` of its forwards."""
    whole = step_cost(config.model.layers, 0, head=head_cost(config.model, config.data), backward=backward)
    span = replace(plan(config)[stage], first=steps.start, last=max(steps.stop, steps.start + 1))
    return span_cost(span, backward=backward) * whole * layer_flops(config)


def _unfinished(facts: Facts, config: TrainConfig, curve: Sequence[Point]) -> str | None:
    done = int(max(e["step"] for e in (*facts.steps, *facts.evals)))
    if facts.end is None or done < config.steps:
        return f"stopped in mid-decay, after step {done:,} of {config.steps:,}"
    if curve[-1].step < config.steps:
        return "its last held-out loss is not finite"
    return None


# What came before


def _sources(directory: Path, facts: Facts, counting: str, clock: str, seen: set[Path]) -> Iterator[Source]:
    recorded = [e for e in read_metrics(directory / METRICS) if e["event"] == "source" and e.get("path")]
    by_path = {e["path"]: e for e in recorded}
    named = {e["path"]: e.get("role", ROLES[0]) for e in recorded}
    for role, path in _named(facts.config):
        named.setdefault(path, role)
    for path, role in named.items():
        yield Source(role, path, _cost(_source_run(Path(path), directory), by_path.get(path), counting, clock, seen))


def _named(value: object) -> Iterator[tuple[str, str]]:
    """The paths under keys `source` and `teacher`, wherever they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ROLES and isinstance(inner, str) and inner:
                yield key, inner
            else:
                yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _cost(run: Path | None, event: dict | None, counting: str, clock: str, seen: set[Path]) -> Spent | None:
    if run is not None and run.resolve() not in seen:
        facts, config = _facts(run)
        curve = _curve(facts, config, counting, _timed(run, config) if clock == "timed" else None)
        if curve:
            parts = [s.spent for s in _sources(run, facts, counting, clock, seen | {run.resolve()})]
            return sum((part for part in parts if part), curve[-1].spent)
    amounts = [number(event, name) for name in MEASURES]
    if amounts[0] is None and amounts[2] is None:
        return None
    return Spent(*(amount or 0.0 for amount in amounts))


# What makes losses comparable


def _fingerprint(directory: Path, config: TrainConfig) -> dict[str, str] | None:
    given = map(Path, config.data.text) if len(config.data.text) == 1 else ()
    places = [directory / DATA, *given, directory.resolve().parent / DATA]
    for place in places:
        try:
            files = json.loads((place / "manifest.json").read_text(encoding="utf-8"))["files"]
            digests = {name: entry["sha256"] for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        parts = {"tokenizer": "tokenizer", "held-out text": "heldout.", "training text": "train."}
        return {
            part: " ".join(digest for name, digest in sorted(digests.items()) if name.startswith(prefix))
            for part, prefix in parts.items()
        }
    return None


def settings(config: TrainConfig) -> dict[str, object]:
    """Every setting under one name, such as optim.lr; but for the stages, and what was found out about a teacher."""
    flat: dict[str, object] = {}
    for name, value in to_dict(config).items():
        if name in ("stages", "teacher_shape"):
            continue
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat
