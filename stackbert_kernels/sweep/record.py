"""sweep.json: under which load the runs are made; of each method, how long its steps took and the configuration that follows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackbert_kernels.compare.runs import SWEEP
from stackbert_kernels.config import ConfigError, TrainConfig, from_dict, to_dict
from stackbert_kernels.train.run_directory import write_json


@dataclass(frozen=True)
class Timed:
    """A method whose stages were timed."""

    seconds: float
    """The budget of its runs."""
    seconds_per_step: tuple[float, ...]
    config: TrainConfig


@dataclass(frozen=True)
class Record:
    jobs: int = 1
    """Runs at a time."""
    threads: int | None = None
    """CPU threads of each; None in a sweep that noted none."""
    methods: dict[str, Timed] = field(default_factory=dict)

    def with_method(self, name: str, timed: Timed) -> Record:
        return replace(self, methods=self.methods | {name: timed})


def read(directory: Path) -> Record | None:
    """None where no sweep began."""
    path = directory / SWEEP
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        methods = {
            name: Timed(entry["seconds"], tuple(entry["seconds_per_step"]), from_dict(entry["config"]))
            for name, entry in found["methods"].items()
        }
        return Record(found.get("jobs", 1), found.get("threads"), methods)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def write(directory: Path, record: Record) -> None:
    methods = {
        name: {
            "seconds": timed.seconds,
            "seconds_per_step": list(timed.seconds_per_step),
            "config": to_dict(timed.config),
        }
        for name, timed in record.methods.items()
    }
    write_json(directory / SWEEP, {"jobs": record.jobs, "threads": record.threads, "methods": methods})
