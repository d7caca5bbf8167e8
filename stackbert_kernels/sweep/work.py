"""One piece of work of a sweep: a run, with that of the model that it needs, or the timing of a method."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stackbert_kernels.config import ConfigError, TrainConfig, from_dict, to_dict
from stackbert_kernels.train.budget import TIMED_STEPS, timing_of
from stackbert_kernels.train.checkpoint import CheckpointError
from stackbert_kernels.train.run_directory import CHECKPOINTS, METRICS, MODEL, read_metrics

TIMING_SHARE, LONGEST_TIMING = 0.05, 200
"""Of the budget, and steps a stage: a timing of few short steps is repeated with more, so that a busy moment of the machine decides nothing."""
TRAIN, TIME, FILL = "train", "time", "fill"
"""A run; a timing; a timing without end, which only keeps a core as busy as it is while another run is there."""
ENDLESS = 10**7


@dataclass(frozen=True)
class First:
    """A model that has to be trained before, and the setting of the run that names it."""

    setting: str
    config: TrainConfig
    out: Path


@dataclass(frozen=True)
class Work:
    kind: str
    name: str
    """For a person, such as: mslt seed 1."""
    config: TrainConfig
    out: Path
    seconds: float = 0.0
    """The budget, of which a timing takes a share at most."""
    first: First | None = None

    def plain(self) -> dict:
        first = self.first and {
            "setting": self.first.setting,
            "config": to_dict(self.first.config),
            "out": str(self.first.out),
        }
        return {
            "kind": self.kind,
            "name": self.name,
            "config": to_dict(self.config),
            "out": str(self.out),
            "seconds": self.seconds,
            "first": first,
        }


def work_of(plain: dict) -> Work:
    def read(values: dict) -> dict:
        return values | {"config": from_dict(values["config"]), "out": Path(values["out"])}

    first = plain["first"] and First(**read(plain["first"]))
    return Work(**read(plain) | {"first": first})


def finished(run: Path) -> bool:
    return any(event["event"] == "end" for event in read_metrics(run / METRICS))


def perform(work: Work, *, progress: bool = False) -> dict:
    """What training returned; of a timing, `stage_seconds` are what steps take, and `first_seconds` those of the model before.

    status "refused" and a message where it cannot begin, "crashed" where it broke: no reason for the others not to go on.
    """
    from stackbert_kernels.train.loop import train

    try:
        if work.kind == TRAIN:
            return _trained(work, train, progress)
        return _timed(work, train)
    except (ConfigError, CheckpointError) as error:
        return {"status": "refused", "message": str(error)}
    except Exception as error:  # what breaks one run is told, and the others go on
        traceback.print_exc()
        return {"status": "crashed", "message": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _trained(work: Work, train: Callable, progress: bool) -> dict:
    config, first = work.config, work.first
    if first:
        config = replace(config, **{first.setting: str(first.out.resolve())})
        if not (finished(first.out) and (first.out / MODEL / "config.json").exists()):
            # Where only the log of a finished run is left, its model is made once more, for what it cost then.
            gone = finished(first.out) and not (first.out / CHECKPOINTS).exists()
            result = train(first.config, first.out, fresh=gone, progress=progress)
            if result["status"] != "finished":
                return result | {"message": f"its {first.setting}: {result['message']}"}
    return train(config, work.out, progress=progress)


def _timed(work: Work, train: Callable) -> dict:
    """The directories of timings are removed again, that of the model before once it was used."""
    if work.kind == FILL:
        return _steps_timed(work.config, work.out, ENDLESS, train)
    config, first, before = work.config, work.first, {}
    if not first:
        return _twice(config, work, work.out, train)
    try:
        before = _twice(first.config, work, first.out, train, keep=True)
        if before["status"] != "finished":
            return before
        result = _twice(replace(config, **{first.setting: str(first.out.resolve())}), work, work.out, train)
        return result | {"first_seconds": before["stage_seconds"]}
    finally:
        shutil.rmtree(first.out, ignore_errors=True)


def _twice(config: TrainConfig, work: Work, out: Path, train: Callable, *, keep: bool = False) -> dict:
    result = _steps_timed(config, out, TIMED_STEPS, train, keep=keep)
    if result["status"] == "finished":
        longer = min(LONGEST_TIMING, int(TIMING_SHARE * work.seconds / sum(result["stage_seconds"])))
        if longer > 2 * TIMED_STEPS:
            result = _steps_timed(config, out, longer, train, keep=keep)
    return result


def _steps_timed(config: TrainConfig, out: Path, timed: int, train: Callable, *, keep: bool = False) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    try:
        return train(timing_of(lambda _: config, timed), out, progress=False)
    finally:
        if not keep:
            shutil.rmtree(out, ignore_errors=True)
