"""sweep.json: under which load the runs are made; of each method, how long its steps took, which rates were tried, and what follows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from stackbert_kernels.compare.runs import SWEEP
from stackbert_kernels.config import ConfigError, TrainConfig, from_dict, to_dict
from stackbert_kernels.sweep.settings import Timing
from stackbert_kernels.train.run_directory import write_json


@dataclass(frozen=True)
class Timed:
    """A method whose stages were timed."""

    seconds: float
    """The budget of its runs."""
    timing: Timing
    config: TrainConfig
    source: TrainConfig | None = None
    """The smaller model that its runs train first."""


@dataclass(frozen=True)
class Trial:
    """A run that was made to find a rate."""

    lr: float
    steps: int
    loss: float | None
    """Held out, at its end; None where the run diverged."""
    seconds: float | None
    unigram: float | None = None
    """The loss without context on the same text; None in a sweep that noted none."""

    @property
    def learned(self) -> bool:
        """Whether it got below the loss without context."""
        return self.loss is not None and (self.unigram is None or self.loss < self.unigram)


@dataclass(frozen=True)
class Tuned:
    """The rates that a method was to be tried with, the trials so far, and which was best: None until all were made."""

    rates: tuple[float, ...]
    seconds: float
    seed: int
    tried: tuple[Trial, ...] = ()
    lr: float | None = None

    def with_trial(self, trial: Trial) -> Tuned:
        """Of all rates, the one with the lowest loss is taken; the lowest one where every trial diverged."""
        tried = tuple(sorted((*self.tried, trial), key=lambda t: t.lr))
        best = min(tried, key=lambda t: (t.loss is None, t.loss, t.lr) if t.loss is not None else (True, 0.0, t.lr)).lr
        return replace(self, tried=tried, lr=best if {t.lr for t in tried} == set(self.rates) else None)


@dataclass(frozen=True)
class Record:
    jobs: int = 1
    """Runs at a time."""
    threads: int | None = None
    """CPU threads of each; None in a sweep that noted none."""
    tokens: str = ""
    """Digest of the shards that all runs read, wherever they lie; empty in a sweep that noted none."""
    methods: dict[str, Timed] = field(default_factory=dict)
    tuning: dict[str, Tuned] = field(default_factory=dict)

    def with_text(self, text: tuple[str, ...]) -> Record:
        """The same runs, of the same tokens in another place."""

        def moved(config: TrainConfig | None) -> TrainConfig | None:
            return config and replace(config, data=replace(config.data, text=text))

        methods = {n: replace(t, config=moved(t.config), source=moved(t.source)) for n, t in self.methods.items()}
        return replace(self, methods=methods)

    def with_method(self, name: str, timed: Timed) -> Record:
        return replace(self, methods=self.methods | {name: timed})

    def with_tuning(self, name: str, tuned: Tuned) -> Record:
        return replace(self, tuning=self.tuning | {name: tuned})


def read(directory: Path) -> Record | None:
    """None where no sweep began."""
    path = directory / SWEEP
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        methods = {name: _timed(entry) for name, entry in found["methods"].items()}
        tuning = {name: _tuned(entry) for name, entry in found.get("tuning", {}).items()}
        return Record(found.get("jobs", 1), found.get("threads"), found.get("tokens", ""), methods, tuning)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _timed(entry: dict) -> Timed:
    source = entry.get("source")
    timing = Timing(tuple(entry["seconds_per_step"]), tuple(entry.get("source_seconds_per_step", ())))
    return Timed(entry["seconds"], timing, from_dict(entry["config"]), from_dict(source) if source else None)


def _tuned(entry: dict) -> Tuned:
    tried = tuple(Trial(**trial) for trial in entry["tried"])
    return Tuned(**entry | {"rates": tuple(entry["rates"]), "tried": tried})


def write(directory: Path, record: Record) -> None:
    methods = {
        name: {
            "seconds": timed.seconds,
            "seconds_per_step": list(timed.timing.method),
            "config": to_dict(timed.config),
        }
        | (
            {"source_seconds_per_step": list(timed.timing.source), "source": to_dict(timed.source)}
            if timed.source
            else {}
        )
        for name, timed in record.methods.items()
    }
    tuning = {name: asdict(tuned) for name, tuned in record.tuning.items()}
    told = {"jobs": record.jobs, "threads": record.threads, "tokens": record.tokens, "methods": methods}
    write_json(directory / SWEEP, told | ({"tuning": tuning} if tuning else {}))
